"""The command line: a few lines a command. What it does, engine and convert do."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from typing import Any

import click

from .engine.arguments import model_and_text, named_model, open_session, prompt_text, turn_encoder
from .engine.commands import INTERRUPTED, Commands
from .engine.evaluation_options import drift_options, imatrix_options, perplexity_options
from .engine.option_types import TEXT
from .engine.options import (
    JSON,
    MODEL,
    VERSION,
    bench_options,
    chat_options,
    convert_options,
    memory_options,
    model_options,
    plan_options,
    pull_options,
    quantize_options,
    run_options,
    sampling_options,
)
from .engine.printing import (
    bar,
    bars,
    checked,
    described,
    json_text,
    listed,
    planned,
    print_rows,
    quantized,
    written,
)
from .engine.wording import notice, shown


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@VERSION
def main() -> None:
    """Run language models whose memory does not grow."""
    # NumPy would start threads for matrix products, which only the slow reference backend makes.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@main.command()
@click.argument("model", required=False)
@click.argument("prompt", required=False, type=TEXT)
@model_options
@memory_options
@run_options
@chat_options
@sampling_options
def run(model: str | None, prompt: str | None, **options: Any) -> None:
    """Write text that follows PROMPT.

    MODEL is a GGUF file, or "demo" (the default). The prompt is read from standard input when
    that is piped.
    """
    from .engine.terminal import Meter, ctrl_c, saving

    path, prompt = model_and_text(model, prompt, options)
    text = prompt_text(prompt, options, needed=not options["state_in"])
    if options["hf_repo"] is not None:
        path = _located(options)
    began = time.perf_counter()
    session, loaded = open_session(path, options), time.perf_counter()
    encode = turn_encoder(session.model, options) or session.encode
    meter = Meter(session, loaded - began)
    limit = None if options["limit"] < 0 else options["limit"]
    with ctrl_c(session) as pressed, saving(session, options["state_out"]):
        if text:
            meter.read(text, encode)
        meter.write(limit, flush=not options["state_out"])
    meter.report()
    sys.exit(INTERRUPTED if pressed else 0)


@main.command()
@click.argument("checkpoint", type=click.Path())
@convert_options
def convert(checkpoint: str, target: str | None, outtype: str, **options: Any) -> None:
    """Convert a Hugging Face checkpoint (folder or file) to GGUF."""
    from .convert import convert as convert_checkpoint

    with bar("converting") as report:
        path = convert_checkpoint(checkpoint, target, outtype, notice, report, **options)
    click.echo(written(path))


@main.command("pull")
@click.argument("name", metavar="USER/MODEL[:QUANT]")
@pull_options
def pull_command(name: str, hf_file: str, hf_token: str, **options: Any) -> None:
    """Download a model from the hub, and print where it is.

    Of a repository of GGUF files one is taken: QUANT, else Q4_K_M, Q8_0 or the first. A checkpoint
    is converted, to QUANT or its own precision.
    """
    from .convert.pull import Wanted, pull

    with bars() as report:
        click.echo(pull(Wanted(name, hf_file, token=hf_token, **options), notice, report))


@main.command("ls")
@JSON
def ls_command(as_json: bool) -> None:
    """List the models that were pulled, with the paths that `info`, `bench` and others take."""
    from .convert.store import Store

    rows = Store().listing()
    click.echo(json_text(rows) if as_json else listed(rows))


@main.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="USER/MODEL[:QUANT]...")
def rm_command(names: tuple[str, ...]) -> None:
    """Remove what was pulled: one QUANT, or all of a repository."""
    from .convert.store import Store

    for removed in Store().discard(*names):
        click.echo(f"removed {removed}")


@main.command()
@click.argument("model", required=False)
@MODEL
@JSON
def info(model: str | None, model_option: str | None, as_json: bool) -> None:
    """Show what a model file holds, and what running it takes."""
    from .engine.info import describe

    facts = describe(named_model(model, model_option))
    click.echo(json_text(facts) if as_json else described(facts))


@main.command("plan")
@click.argument("model", required=False)
@plan_options
def plan_command(model: str | None, model_option: str | None, **options: Any) -> None:
    """Show what memory a run of MODEL takes, before it is loaded.

    The sum is resident while a prompt is read; a small model's peak comes before, while kernels are
    loaded. The system can take back pages of the file, which weights are mapped from or rearranged
    from. Compiling kernels, once, is not counted.
    """
    from .engine.cpu import check_threads
    from .engine.footprint import plan

    facts = plan(
        named_model(model, model_option), check_threads(options["threads"]),
        options["repack"], options["context"], options["sequences"],
        options["cache_type_k"], options["cache_type_v"], options["state_type"],
    )  # fmt: skip
    click.echo(json_text(facts) if options["as_json"] else planned(facts))


@main.command()
@click.argument("model", required=False)
@click.argument("text", required=False, type=TEXT)
@MODEL
@click.option("-p", "--prompt", "prompt_option", type=TEXT, help="The text, in place of TEXT.")
@click.option("-f", "--file", "prompt_file", metavar="FILE", help="Read the text from a file.")
@click.option("--ids", is_flag=True, help="Print the ids only.")
@JSON
def tokenize(model: str | None, text: str | None, ids: bool, as_json: bool, **options: Any) -> None:
    """Show the tokens of a text."""
    from .engine.info import open_tokenizer

    path, text = model_and_text(model, text, options)
    tokenizer = open_tokenizer(path)
    tokens = tokenizer.encode(prompt_text(text, options))
    rows = [{"id": token, "piece": tokenizer.shown(token)} for token in tokens]
    if ids or as_json:
        click.echo(json.dumps(tokens if ids else rows))
    else:
        click.echo("\n".join(f"{row['id']:8} '{shown(row['piece'])}'" for row in rows))


@main.group()
def gguf() -> None:
    """Look into GGUF files, change, split and check them."""


@gguf.command()
@click.argument("file")
@JSON
@click.option("--no-tensors", "tensors", flag_value=False, default=True, help="Show keys only.")
@click.option("--full", is_flag=True, help="Show long texts and arrays to their end.")
def dump(file: str, as_json: bool, tensors: bool, full: bool) -> None:
    """Show all keys, and where each tensor lies."""
    from .engine import dump as dumping

    if as_json:
        click.echo(json_text(dumping.dump(file, full, tensors)))
        return
    for line in dumping.dump_lines(file, full, tensors):
        click.echo(line)


# Unknown options are let through for values below zero.
@gguf.command("set", context_settings={"ignore_unknown_options": True})
@click.argument("file")
@click.argument("key", type=TEXT)
@click.argument("value", required=False, type=TEXT)
@click.option("--type", "kind", metavar="TYPE", help="u8, i8 ... f64, bool, str, or arr[str] ...")
@click.option("--remove", is_flag=True, help="Take the key away.")
@click.option("--out", "target", metavar="OUT", help="Write another file, and leave FILE.")
@click.option("--force", is_flag=True, help="Also keys that say how the tensors are to be read.")
def set_command(file: str, key: str, value: str | None, remove: bool, **options: Any) -> None:
    """Give KEY of FILE a VALUE; arrays are JSON lists. A key that is there keeps its type."""
    from .convert.edit import set_pair

    for text in (key, value or ""):
        if re.fullmatch("--[a-z-]+", text):
            raise click.UsageError(f"there is no option {text}")
    if remove == (value is not None):
        raise click.UsageError("give either a VALUE or --remove")
    with bar("writing") as report:
        path = set_pair(file, key, value, **options, progress=report)
    click.echo(path)


@gguf.command()
@click.argument("file")
@click.argument("prefix", metavar="OUT-PREFIX")
@click.option("--split-max-size", "max_size", metavar="N(M|G)", help="Largest size of a part.")
@click.option("--split-max-tensors", "max_tensors", type=int, help="Tensors of a part. [128]")
def split(file: str, prefix: str, max_size: str | None, max_tensors: int | None) -> None:
    """Split a model into parts, as llama.cpp does.

    They are called OUT-PREFIX-00001-of-00003.gguf and so on.
    """
    from .convert import edit

    with bar("splitting") as report:
        paths = edit.split(file, prefix, max_size, max_tensors, report)
    for path in paths:
        click.echo(written(path))


@gguf.command()
@click.argument("first", metavar="FIRST-PART")
@click.argument("out")
def merge(first: str, out: str) -> None:
    """Merge the parts of a model, given as the first, into one file."""
    from .convert import edit

    with bar("merging") as report:
        path = edit.merge(first, out, report)
    click.echo(written(path))


@gguf.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@JSON
def check(files: tuple[str, ...], as_json: bool) -> None:
    """Read files to their end, and say what is wrong.

    NaN, infinities and wrong sizes are found, and what cannot be run. The status is then 1.
    """
    from .engine import check as checking

    with bars() as report:
        found = checking.check_all(files, report)
    click.echo(json_text(found) if as_json else checked(found))
    sys.exit(any(facts["problems"] for facts in found))


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
        options["max_ram"], options["cache_type_k"], options["cache_type_v"],
        options["state_type"],
    )  # fmt: skip
    with bars() as report:
        print_rows(measured(plan, notice, report), output)


@main.command("perplexity")
@click.argument("model", required=False)
@perplexity_options
def perplexity_command(**options: Any) -> None:
    """Measure how well MODEL foretells a text.

    The text is read in one pass, the state carried from its first token to its last; with -c or
    --chunks in chunks, as llama-perplexity reads it. Nats by position show whether a state that
    has read much is worth more than one that has read little.
    """
    from .engine.measuring import perplexity

    sys.exit(INTERRUPTED if perplexity(options) else 0)


@main.command("imatrix")
@click.argument("model", required=False)
@imatrix_options
def imatrix_command(**options: Any) -> None:
    """Collect what the weights of MODEL are multiplied with over a text, for `quantize`.

    The file is llama.cpp's importance matrix, made as llama-imatrix makes it. Best given a model of
    16 bits, and some hundred chunks of text like that which the model is for.
    """
    from .engine.measuring import collect_imatrix

    sys.exit(INTERRUPTED if collect_imatrix(options) else 0)


@main.command()
def warmup() -> None:
    """Compile all kernels for this processor, so that no run has to."""
    from .kernels.objects import warm_up

    with bar("compiling") as report:
        folder, count = warm_up(notice, report)
    click.echo(f"{folder}: {count} kernels")


@main.command("quantize")
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT")
@click.argument("kind", metavar="TYPE")
@quantize_options
def quantize_command(source: str, target: str, kind: str, **options: Any) -> None:
    """Write the model IN to OUT with the matrices in smaller types.

    TYPE is one of F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q4_K_M, Q4_K_S, Q4_0, IQ4_NL, IQ4_XS,
    MXFP4_MOE, Q3_K_M and Q2_K: mixtures as llama.cpp has them, in which the small matrices that
    drive a recurrence keep eight bits.
    """
    from .convert.quantize import Quantization, wishes
    from .engine.cpu import check_threads
    from .engine.measuring import costs

    dry, threads = options["dry_run"], check_threads(options["threads"])
    work = Quantization(
        source, kind, wishes(options), options["imatrix"], options["allow_requantize"]
    )
    facts = work.facts()
    if not dry:
        work.check(target, options["text"])
    if options["text"] is not None:
        facts["report"] = costs(source, work.roundings(notice), options["text"], threads)
    if not dry:
        with bar("quantizing") as report:
            work.write(target, threads, notice, report)
    click.echo(json_text(facts) if options["as_json"] else quantized(facts, dry))


@main.command("drift")
@click.argument("model", required=False)
@drift_options
def drift_command(**options: Any) -> None:
    """Show what rounding states does to perplexity and to the states, by position in a text.

    "-nearest" types are there to compare with: rounded to the nearest, what is small is lost.
    """
    from .engine.measuring import compare_states

    sys.exit(INTERRUPTED if compare_states(options) else 0)


def _located(options: dict[str, Any]) -> str:
    """The file of the model that -hf names, pulled if it is not there."""
    from .convert.pull import Wanted, locate

    wanted = Wanted(options["hf_repo"], options["hf_file"], token=options["hf_token"])
    with bars() as report:
        return str(locate(wanted, options["offline"], notice, report))


if __name__ == "__main__":
    main()
