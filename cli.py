"""The command line: a few lines a command. What it does, engine and convert do."""

from __future__ import annotations

import errno
import json
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .engine.options import (
    bench_options,
    chat_options,
    memory_options,
    model_options,
    plan_options,
    sampling_options,
)
from .engine.printing import bar, bars, notice, planned, print_rows, rate, shown, size
from .kernels.errors import InvalidInput, KeelbackError

if TYPE_CHECKING:
    from .engine.session import Session

INTERRUPTED = 130


class Commands(click.Group):
    """A group whose commands turn errors that a user can mend into one sentence and status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        warnings.showwarning = lambda message, *_: notice(str(message))
        try:
            return super().invoke(ctx)
        except KeelbackError as error:
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise click.ClickException(f"the output cannot be written ({error.strerror})") from None
        except MemoryError:
            raise click.ClickException("there is not enough memory for this model") from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="keelback")
def main() -> None:
    """Run language models whose memory does not grow."""
    # NumPy would start threads for matrix products, which only the slow reference backend makes.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@main.command()
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@model_options
@memory_options
@click.option(
    "-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt, in place of PROMPT."
)
@click.option("-f", "--file", "prompt_file", metavar="FILE", help="Read the prompt from a file.")
@click.option(
    "-n",
    "--predict",
    "--n-predict",
    "limit",
    type=int,
    default=-1,
    help="Tokens to write; -1: no limit.",
)
@click.option("-s", "--seed", type=int, help="Seed of the random choices; -1 or none: a new one.")
@chat_options
@sampling_options
@click.option(
    "--logit-bias",
    multiple=True,
    metavar="ID(+/-)BIAS",
    help="Add to the logit of an id, as 15043+1.5.",
)
@click.option(
    "-r",
    "--reverse-prompt",
    "--stop",
    "stop",
    multiple=True,
    metavar="TEXT",
    help="End before TEXT.",
)
@click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-text token.")
@click.option(
    "--state-in", metavar="FILE", help="Go on from a saved state; a prompt is then optional."
)
@click.option("--state-out", metavar="FILE", help="Save the state at the end, also after Ctrl-C.")
def run(model: str | None, prompt: str | None, **options: Any) -> None:
    """Write text that follows PROMPT, with MODEL: a GGUF file, or "demo" (the default).

    The prompt is read from standard input when that is piped.
    """
    from .engine.chat import turn_encoder
    from .engine.terminal import ctrl_c, saving

    path, prompt = _arguments(model, prompt, options)
    text = _text(prompt, options, needed=not options["state_in"])
    began = time.perf_counter()
    session, loaded = _session(path, options), time.perf_counter()
    encode = turn_encoder(session.model, options) or session.encode
    meter = Meter(session, loaded - began)
    limit = None if options["limit"] < 0 else options["limit"]
    with ctrl_c(session) as pressed, saving(session, options["state_out"]):
        if text:
            meter.read(text, encode)
        meter.write(limit, flush=not options["state_out"])
    click.echo()
    click.echo(meter.line(), err=True)
    sys.exit(INTERRUPTED if pressed else 0)


class Meter:
    """Runs a session and measures it."""

    def __init__(self, session: Session, load_seconds: float) -> None:
        self.session, self.load_seconds = session, load_seconds
        self.prompt_tokens, self.prompt_seconds, self.seconds = 0, 0.0, 0.0

    def read(self, text: str, encode: Callable[[str], list[int]]) -> None:
        """Feed the prompt, with a progress bar when it takes more than a moment."""
        began, before = time.perf_counter(), self.session.state.position
        try:
            ids = encode(text)
            with bar("reading") as report:
                self.session.feed(ids, progress=lambda done: report(done, len(ids)))
        finally:
            self.prompt_tokens = self.session.state.position - before
            self.prompt_seconds = time.perf_counter() - began

    def write(self, limit: int | None, flush: bool) -> None:
        """Print text as it comes."""
        began = time.perf_counter()
        try:
            for piece in self.session.generate(limit):
                click.echo(piece, nl=False)
            if flush:
                click.echo(self.session.stream.flush(), nl=False)
        finally:
            self.seconds = time.perf_counter() - began

    def line(self) -> str:
        """What the run took."""
        layout, written = self.session.state.layout, self.session.generated
        parts = [
            f"load {self.load_seconds:.2f} s",
            f"prompt {self.prompt_tokens} tokens, {rate(self.prompt_tokens, self.prompt_seconds)}",
            f"generated {written} tokens, {rate(written, self.seconds)}",
            f"state {size(layout.fixed_bytes)} fixed + {size(layout.bytes_per_token)} per token",
            f"seed {self.session.sampling.seed}",
        ]
        return " | ".join(parts)


@main.command()
@click.argument("checkpoint", type=click.Path())
@click.option(
    "-o",
    "--outfile",
    "target",
    metavar="FILE",
    help="The file to write; without: NAME-TYPE.gguf here.",
)
@click.option(
    "--outtype",
    default="auto",
    type=click.Choice(["auto", "f32", "f16", "bf16", "q8_0"]),
    help="Type of the matrices.",
)
def convert(checkpoint: str, target: str | None, outtype: str) -> None:
    """Convert a Hugging Face checkpoint folder to GGUF."""
    from .convert import convert as convert_checkpoint

    with bar("converting") as report:
        path = convert_checkpoint(checkpoint, target, outtype, notice, report)
    click.echo(f"{path}: {size(path.stat().st_size)}")


@main.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="FILE", help="The model, in place of MODEL.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(model: str | None, model_option: str | None, as_json: bool) -> None:
    """Show what a model file holds, and what running it takes."""
    from .engine.info import describe

    facts = describe(_one(model, model_option, "model") or "demo")
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if name == "tensors":
            rows = (f"  {shown(t['name']):32} {t['type']:6} {t['shape']}" for t in value)
            value = "\n".join(rows)
            click.echo(f"{name}:\n{value}")
        else:
            click.echo(f"{name.replace('_', ' '):18} {shown(value)}")


@main.command("plan")
@click.argument("model", required=False)
@plan_options
def plan_command(model: str | None, model_option: str | None, **options: Any) -> None:
    """Show what memory a run of MODEL takes, before it is loaded.

    The sum is what is resident at the peak, while a prompt is read. The system can take back the
    pages of weights that stay in the file, "mapped", where memory is short.
    """
    from .engine.cpu import check_threads
    from .engine.footprint import plan

    facts = plan(
        _one(model, model_option, "model") or "demo", check_threads(options["threads"]),
        options["repack"], options["context"], options["sequences"],
    )  # fmt: skip
    click.echo(json.dumps(facts, indent=2) if options["as_json"] else planned(facts))


@main.command()
@click.argument("model", required=False)
@click.argument("text", required=False)
@click.option("-m", "--model", "model_option", metavar="FILE", help="The model, in place of MODEL.")
@click.option("-p", "--prompt", "prompt_option", metavar="TEXT", help="The text, in place of TEXT.")
@click.option("-f", "--file", "prompt_file", metavar="FILE", help="Read the text from a file.")
@click.option("--ids", is_flag=True, help="Print the ids only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tokenize(model: str | None, text: str | None, ids: bool, as_json: bool, **options: Any) -> None:
    """Show the tokens of a text."""
    from .engine.info import open_tokenizer

    path, text = _arguments(model, text, options)
    tokenizer = open_tokenizer(path)
    tokens = tokenizer.encode(_text(text, options))

    def shown(token: int) -> str:
        return tokenizer.piece(token, skip_special=False).decode("utf-8", "backslashreplace")

    if ids:
        click.echo(json.dumps(tokens))
    elif as_json:
        click.echo(json.dumps([{"id": token, "piece": shown(token)} for token in tokens]))
    else:
        for token in tokens:
            click.echo(f"{token:8} {shown(token)!r}")


@main.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@bench_options
@memory_options
def bench(models: tuple[str, ...], more: tuple[str, ...], output: str, **options: Any) -> None:
    """Measure speed and memory, with llama-bench's options and fields.

    Lists, as -t 1,2, measure every combination. "reached" is the share of the memory's read
    bandwidth, probed beside each test, that the bytes of a token make up.
    """
    from .engine.bench import Plan
    from .engine.bench import bench as measured

    plan = Plan(
        (*models, *more) or ("demo",), options["threads"] or (), options["n_prompt"],
        options["n_gen"], options["n_depth"], options["repetitions"], options["repack"],
        options["max_ram"],
    )  # fmt: skip
    with bars() as report:
        print_rows(measured(plan, notice, report), output)


@main.command()
def warmup() -> None:
    """Compile all kernels for this processor, so that no run has to."""
    from .engine.objects import warm_up

    with bar("compiling") as report:
        folder, count = warm_up(notice, report)
    click.echo(f"{folder}: {count} kernels")


def _session(path: str, options: dict[str, Any]) -> Session:
    """Load the model and start a session, or go on with a saved one."""
    from .engine.model import Model
    from .engine.session import Session
    from .engine.snapshot import Snapshot

    with bars(wiped=False) as report:
        model = Model(
            path, options["threads"], options["backend"], notice, report,
            options["repack"], options["max_ram"], text=True,
        )  # fmt: skip
    names = (
        "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n",
        "presence_penalty", "frequency_penalty",
    )  # fmt: skip
    settings = {name: options[name] for name in names if options[name] is not None}
    if options["logit_bias"]:
        settings["logit_bias"] = dict(_bias(text) for text in options["logit_bias"])
    seed = options["seed"]
    if options["state_in"]:
        if seed is not None and seed >= 0:
            settings["seed"] = seed
        return Session.resume(
            model, Snapshot.load(options["state_in"], model),
            options["stop"], options["ignore_eos"], **settings,
        )  # fmt: skip
    settings["seed"] = secrets.randbits(32) if seed is None or seed < 0 else seed
    return Session(model, stop=options["stop"], ignore_eos=options["ignore_eos"], **settings)


def _arguments(
    model: str | None, text: str | None, options: dict[str, Any]
) -> tuple[str, str | None]:
    """Model and text from positions or options; raises InvalidInput for a missing model."""
    text = _one(text, options["prompt_option"], "prompt")
    path = _one(model, options["model_option"], "model") or "demo"
    if path != "demo" and not Path(path).exists():
        raise InvalidInput(
            f"{path}: there is no such model file (to prompt the demo model: keelback run -p TEXT)"
        )
    return path, text


def _text(text: str | None, options: dict[str, Any], needed: bool = True) -> str:
    """The prompt, from wherever it comes."""
    from .engine.terminal import read_prompt

    if text is not None and options["prompt_file"] is not None:
        raise click.UsageError("the prompt is given twice, as text and as a file")
    return read_prompt(text, options["prompt_file"], needed)


def _one(argument: str | None, option: str | None, name: str) -> str | None:
    if argument is not None and option is not None:
        raise click.UsageError(f"the {name} is given twice, as an argument and as an option")
    return argument if argument is not None else option


def _bias(text: str) -> tuple[int, float]:
    """`ID+BIAS` or `ID-BIAS`, llama.cpp's spelling."""
    at = max(text.find("+"), text.find("-", 1))
    try:
        return int(text[:at]), float(text[at:])
    except ValueError:
        raise InvalidInput(f"--logit-bias {text!r} is not of the form ID+BIAS or ID-BIAS") from None


if __name__ == "__main__":
    main()
