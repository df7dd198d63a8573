"""The options of perplexity, imatrix and drift, which read a text to learn of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .options import JSON, MODEL, THREADS, memory_options


def evaluation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where a model and a text come from that are measured together."""
    command = memory_options(command)
    for option in (
        THREADS,
        click.option(
            *("-b", "--batch-size", "batch"),
            type=click.IntRange(min=1), metavar="N", default=512, show_default=True,
            help="Tokens of a forward, at most 512; fewer where the vocabulary is large.",
        ),
        click.option(
            "-f", "--file", "text_file", metavar="FILE",
            help="The text; -: standard input, the default where that is piped.",
        ),
        MODEL,
    ):  # fmt: skip
        command = option(command)
    return command


def perplexity_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How `perplexity` reads a text, and what it compares it with."""
    command = evaluation_options(command)
    for option in (
        JSON,
        click.option(
            "--plot", metavar="SVG", help="Draw nats a token by position, as a picture."
        ),
        click.option(
            "--even", is_flag=True, help="Positions in buckets of one size, not growing ones."
        ),
        click.option(
            "--kl-divergence", "compare", is_flag=True,
            help="Compare with the logits of FILE, on the text it was written for.",
        ),
        click.option(
            "--kl-divergence-base", "base", metavar="FILE",
            help="Save all logits; with --kl-divergence, compare with these.",
        ),
        click.option("--chunks", type=int, metavar="K", help="In chunks, the first K of them."),
        click.option(
            *("-c", "--ctx-size", "chunk"), type=int, metavar="N",
            help="In chunks of N tokens; 512 with --chunks alone. They know nothing of each "
            "other, and the second half of each counts: llama-perplexity's figure.",
        ),
        click.option("--tokens", type=int, metavar="N", help="In one pass, the first N tokens."),
    ):  # fmt: skip
        command = option(command)
    return command


def imatrix_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `imatrix` reads and writes."""
    command = evaluation_options(command)
    for option in (
        click.option("--json", "as_json", is_flag=True, help="With --show-statistics: as JSON."),
        click.option(
            "--show-statistics", "shown", metavar="FILE",
            help="Show what an importance matrix holds, and do nothing else.",
        ),
        click.option(
            "--in-file", "added", metavar="FILE", multiple=True,
            help="Add up with this importance matrix (repeatable); without a text, only "
            "such ones, and MODEL is not read.",
        ),
        click.option(
            "--parse-special", "special", is_flag=True,
            help="Control tokens that the text spells are those tokens.",
        ),
        click.option(
            "--process-output", "head", is_flag=True, help="Also of the output matrix."
        ),
        click.option(
            "--chunks", type=click.IntRange(min=1), metavar="K",
            help="The first K chunks of the text.",
        ),
        click.option(
            *("-c", "--ctx-size", "chunk"),
            type=click.IntRange(min=1), metavar="N", default=512, show_default=True,
            help="Tokens of a chunk; chunks know nothing of each other.",
        ),
        click.option(
            *("-o", "--output-file", "target"), metavar="FILE", default="imatrix.gguf",
            show_default=True, help="The file to write.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def drift_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `drift` compares, and over what."""
    for option in (
        JSON,
        THREADS,
        click.option("-n", "--tokens", "limit", type=click.IntRange(1), help="Tokens at most."),
        click.option(
            "--state-type", "kinds", multiple=True,
            type=click.Choice(["bf16", "int8", "bf16-nearest", "int8-nearest"]),
            help="A type to compare with f32, as often as you like. Default: all of them.",
        ),
        click.option(
            *("-f", "--file", "--text", "text_file"),
            metavar="FILE", help="The text; -: standard input, the default where it is piped.",
        ),
        MODEL,
    ):  # fmt: skip
        command = option(command)
    return command
