"""The command line's options, as decorators for its commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .commands import show_version
from .option_types import TEXT, Bias, Numbers, Setting, Size

#: What matrices are converted to; those of fewer than eight bits as mixtures.
OUTTYPES = click.Choice(
    [
        "auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s",
        "q4_0", "iq4_nl", "iq4_xs", "mxfp4_moe", "q3_k_m", "q2_k",
    ],
    case_sensitive=False,
)  # fmt: skip

VERSION = click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version,
    help="Show the version and exit.",
)  # fmt: skip
MODEL = click.option(
    "-m", "--model", "model_option", metavar="FILE", help="The model, in place of MODEL."
)
THREADS = click.option(
    *("-t", "--threads"), type=click.IntRange(min=1), metavar="N",
    help="Threads. Default: one a processor.",
)  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_NO_REPACK = click.option(
    "--no-repack",
    "repack",
    flag_value=False,
    default=None,
    help="Leave weights in the file: slower, and the system can take their pages back.",
)
_FILE = click.option(
    *("-hff", "--hf-file", "hf_file"), metavar="FILE", help="The file, whatever QUANT says."
)
_TOKEN = click.option(
    *("-hft", "--hf-token", "hf_token"),
    metavar="TOKEN",
    help="Access token of the hub. Default: HF_TOKEN of the environment.",
)
_IMATRIX = click.option(
    "--imatrix", metavar="FILE", help="Weigh columns as `keelback imatrix` found them important."
)


def memory_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where weights are kept, how keys and values are, and how much memory may be taken."""
    command = cache_options(command)
    for option in (
        click.option(
            "--max-ram",
            type=Size(),
            help="Refuse what takes more memory than, say, 600M or 2G, the file's pages apart.",
        ),
        _NO_REPACK,
    ):
        command = option(command)
    return command


def cache_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How layers keep what they have read: states, and the keys and values of attention."""
    command = click.option(
        "--state-type",
        type=click.Choice(["f32", "bf16", "int8"]), default="f32", show_default=True,
        help="How recurrences keep their matrices; all but f32 are rounded after every token.",
    )(command)  # fmt: skip
    kinds = click.Choice(["f16", "q8_0", "f32"])
    for flags, what in (
        (("-ctv", "--cache-type-v"), "values"),
        (("-ctk", "--cache-type-k"), "keys"),
    ):
        command = click.option(
            *flags, type=kinds, default="f16", show_default=True,
            help=f"How attention layers keep {what}.",
        )(command)  # fmt: skip
    return command


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where the model comes from and what runs it."""
    for option in (
        click.option(
            "--backend",
            type=click.Choice(["cpu", "numpy"]),
            default="cpu",
            show_default=True,
            help="What runs the model; numpy is slow.",
        ),
        click.option(
            *("-c", "--ctx-size", "context"),
            type=click.IntRange(min=0),
            metavar="N",
            default=0,
            show_default=True,
            help="Tokens that attention layers may keep; 0: as many as come.",
        ),
        THREADS,
        click.option("--offline", is_flag=True, help="With -hf: run what is there, or nothing."),
        _TOKEN,
        _FILE,
        click.option(
            *("-hf", "--hf-repo", "hf_repo"),
            metavar="NAME",
            help="The model USER/MODEL[:QUANT] of the Hugging Face hub, pulled if it is not there.",
        ),
        MODEL,
    ):
        command = option(command)
    return command


def pull_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `pull` does with a repository."""
    for option in (
        _TOKEN,
        click.option("--revision", metavar="REV", help="A branch, a tag or a commit."),
        click.option(
            "--keep", is_flag=True, help="Keep a checkpoint's original files once it is converted."
        ),
        click.option(
            "--outtype",
            type=OUTTYPES,
            help="Convert the checkpoint to this type, also where there are GGUF files.",
        ),
        _FILE,
    ):
        command = option(command)
    return command


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is written, how far, and which states it begins and ends with."""
    for option in (
        click.option(
            "--state-out", metavar="FILE", help="Save the state at the end, also after Ctrl-C."
        ),
        click.option(
            "--state-in",
            metavar="FILE",
            help="Go on from a saved state; a prompt is then optional.",
        ),
        click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-text token."),
        click.option(
            *("-r", "--reverse-prompt", "--stop", "stop"),
            multiple=True,
            metavar="TEXT",
            help="End before TEXT.",
        ),
        click.option(
            "--logit-bias",
            multiple=True,
            type=Bias(),
            metavar="ID(+/-)BIAS",
            help="Add to the logit of an id, as 15043+1.5.",
        ),
        click.option(
            *("-s", "--seed"),
            type=Setting("seed", int, default=-1),
            help="Seed of the random choices. Default, or -1: that of --state-in, or a new one.",
        ),
        click.option(
            *("-n", "--predict", "--n-predict", "limit"),
            type=click.IntRange(min=-1),
            metavar="N",
            default=-1,
            show_default=True,
            help="Tokens to write; -1: until the text ends, which it need not.",
        ),
        click.option(
            *("-f", "--file", "prompt_file"),
            metavar="FILE",
            help="Read the prompt from a file; -: from standard input.",
        ),
        click.option(
            *("-p", "--prompt", "prompt_option"),
            type=TEXT,
            help="The prompt, in place of PROMPT.",
        ),
    ):
        command = option(command)
    return command


def convert_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a checkpoint is converted to."""
    for option in (
        click.option(
            "--tokenizer",
            metavar="PATH",
            help="Take the vocabulary of another folder, or of a file.",
        ),
        _IMATRIX,
        click.option(
            "--outtype",
            default="auto",
            type=OUTTYPES,
            show_default=True,
            help="Type of the matrices; auto: the checkpoint's own.",
        ),
        click.option(
            *("-o", "--outfile", "target"),
            metavar="FILE",
            help="The file to write. Default: NAME-TYPE.gguf in this folder.",
        ),
    ):
        command = option(command)
    return command


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How tokens are chosen; what is not given comes from the snapshot or the model file."""
    for flag, name, kind, text in reversed(
        [
            ("--temp", "temperature", float, "Temperature; 0 takes the most likely token. [0.8]"),
            ("--top-k", "top_k", int, "Keep the K most likely tokens; 0 keeps all. [40]"),
            ("--top-p", "top_p", float, "Keep the likeliest tokens that make up P. [0.95]"),
            ("--min-p", "min_p", float, "Drop tokens below P times the likeliest. [0.05]"),
            ("--repeat-penalty", "repeat_penalty", float, "Penalise recent tokens. [1.0: off]"),
            ("--repeat-last-n", "repeat_last_n", int, "How many tokens count as recent. [64]"),
            ("--presence-penalty", "presence_penalty", float, "Subtract from recent tokens. [0]"),
            (
                "--frequency-penalty",
                "frequency_penalty",
                float,
                "Subtract for every recent use. [0]",
            ),
        ]
    ):
        command = click.option(flag, name, type=Setting(name, kind), help=text)(command)
    return command


def chat_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Messages in place of plain text; any of these options asks for it."""
    for option in (
        click.option(
            "--chat-template-kwargs", metavar="JSON",
            help="Variables for the chat template; implies -st.",
        ),
        click.option(
            "--chat-template-file", metavar="FILE", help="Likewise, from a file; implies -st."
        ),
        click.option(
            "--chat-template", metavar="JINJA",
            help="A template in place of the model's; implies -st.",
        ),
        click.option(
            *("-sys", "--system-prompt", "system_prompt"), metavar="TEXT",
            help="A system message before the prompt; implies -st.",
        ),
        click.option(
            *("-st", "--single-turn"), is_flag=True,
            help="Answer PROMPT as a user's message, by the model's chat template.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def bench_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `bench` measures, in llama-bench's spelling."""
    lists: dict[str, Any] = {"type": Numbers(0), "show_default": True}
    forms = click.Choice(["md", "csv", "json", "jsonl"])
    for option in reversed(
        [
            click.option(
                *("-m", "--model", "more"),
                metavar="FILE",
                multiple=True,
                help="A model, in place of MODEL.",
            ),
            click.option(
                "-p", "--n-prompt", default="512", help="Tokens of a prompt; 0: no test.", **lists
            ),
            click.option(
                "-n", "--n-gen", default="128", help="Tokens one by one; 0: no test.", **lists
            ),
            click.option(
                "-d", "--n-depth", default="0", help="Tokens that were read before.", **lists
            ),
            click.option(
                "-r", "--repetitions", type=click.IntRange(min=1), metavar="N", default=5,
                show_default=True, help="Repetitions of every test.",
            ),
            click.option(
                "-t", "--threads", type=Numbers(1), help="Threads. Default: one a processor."
            ),
            click.option(
                "-o", "--output", type=forms, default="md", show_default=True,
                help="How rows are printed.",
            ),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `plan` plans for."""
    command = cache_options(command)
    for option in (
        JSON,
        _NO_REPACK,
        click.option(
            *("-np", "--parallel", "sequences"), type=click.IntRange(min=1), metavar="N",
            default=1, show_default=True, help="Sequences at once, a state each.",
        ),
        click.option(
            *("-c", "--ctx-size", "context"), type=click.IntRange(min=1), metavar="N",
            default=4096, show_default=True,
            help="Tokens of a sequence: attention layers keep keys and values of each.",
        ),
        THREADS,
        MODEL,
    ):  # fmt: skip
        command = option(command)
    return command


def quantize_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `quantize` does otherwise than the mixture has it, in llama-quantize's spelling."""
    for option in reversed(
        [
            _IMATRIX,
            click.option(
                "--tensor-type", "overrides", metavar="PATTERN=TYPE", multiple=True,
                help="The type of tensors whose names PATTERN is found in; the first counts.",
            ),
            click.option(
                "--token-embedding-type", "embedding", metavar="TYPE",
                help="The type of the token embedding.",
            ),
            click.option(
                "--output-tensor-type", "output", metavar="TYPE", help="The type of output.weight."
            ),
            click.option(
                "--leave-output-tensor", is_flag=True, help="Leave output.weight as it is."
            ),
            click.option("--pure", is_flag=True, help="One type for all matrices, and no mixture."),
            click.option(
                "--plain", is_flag=True,
                help="llama.cpp's mixture, also for the small matrices that drive a recurrence.",
            ),
            click.option(
                "--allow-requantize", is_flag=True, help="Also round what was rounded before."
            ),
            click.option("--dry-run", is_flag=True, help="Show what tensors would become."),
            click.option(
                "--report", "text", metavar="FILE",
                help="Show what each tensor's type costs over the text of FILE, which comes first.",
            ),
            THREADS,
            JSON,
        ]
    ):  # fmt: skip
        command = option(command)
    return command
