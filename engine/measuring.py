"""The commands that read a text to learn of a model, from their options to their status."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from ..kernels.errors import InvalidInput
from ..kernels.files import check_target
from ..kernels.formats import imatrix
from ..kernels.statetypes import STATE_TYPES
from .arguments import named_model
from .drift import drift
from .evaluation import Task, evaluate
from .evaluation_text import drift_lines, found_lines, running_list, statistics_lines
from .importance import collect, statistics, unseen, watch
from .model import Model
from .perplexity import chunks_of
from .printing import bars, json_text, written
from .report import Rounding, report
from .terminal import read_prompt
from .wording import notice


def perplexity(options: dict[str, Any]) -> bool:
    """Measure, and print what was found; whether Ctrl-C has ended it early."""
    names = ("chunk", "chunks", "tokens", "batch", "base", "compare", "plot", "even")
    text = "" if options["compare"] else _text(options["text_file"])
    task = Task(text, **{name: options[name] for name in names})
    task.check()
    _check_written(options, None if task.compare else task.base, task.plot)
    model = _open(options)
    with bars() as report:
        found = evaluate(model, task, report, None if options["as_json"] else running_list)
    shown = json_text(found) if options["as_json"] else "\n".join(found_lines(found))
    click.echo(shown)
    if found["interrupted"] and task.base is not None and not task.compare:
        notice(f"interrupted: {task.base} is not written, for it would be of a part of the text")
    return bool(found["interrupted"])


def collect_imatrix(options: dict[str, Any]) -> bool:
    """Collect importance and write it, or show what a file holds; whether Ctrl-C has ended it."""
    if options["shown"] is not None:
        rows = statistics(options["shown"])
        lines = [json_text(rows)] if options["as_json"] else statistics_lines(rows)
        click.echo("\n".join(lines))
        return False
    if options["as_json"]:
        raise InvalidInput("--json is for statistics; give --show-statistics, or leave it out")
    text, target = _text(options["text_file"]), Path(options["target"])
    check_target(target)
    _check_written(options, options["target"])
    more = [(imatrix.read(path), path) for path in options["added"]]
    # What cannot be added is refused before a long text is read.
    found, interrupted = _sum(imatrix.Importance(), more), False
    if not text and not more:
        raise InvalidInput("there is no text to collect from; give a file (-f) or a pipe")
    if text:
        found, interrupted = _collected(options, text)
        found = _sum(found, more)
    for sentence in unseen(found):
        notice(sentence)
    imatrix.write(target, found)
    click.echo(f"{written(target)}, {found.chunks} chunks of {found.chunk_size}")
    return interrupted


def _collected(options: dict[str, Any], text: str) -> tuple[imatrix.Importance, bool]:
    """What a text lets see, and whether Ctrl-C has ended it early."""
    watched: dict[str, Any] = {}
    head = options["head"]
    model = _open(options, amend=lambda graph: watched.update(watch(graph, head)))
    chunks = chunks_of(model, text, options["chunk"], options["chunks"], options["special"])
    with bars() as report:
        found, interrupted = collect(model, watched, chunks, report, head, options["batch"])
    found.datasets = [options["text_file"] or "-"]
    return found, interrupted


def _sum(
    found: imatrix.Importance, more: Iterable[tuple[imatrix.Importance, str]]
) -> imatrix.Importance:
    """Importance and that of files, each with its path."""
    for each, path in more:
        found.add(each, path)
    return found


def compare_states(options: dict[str, Any]) -> bool:
    """Show what rounding states costs over a text; whether Ctrl-C has ended it early."""
    text, kinds = _text(options["text_file"]), options["kinds"] or tuple(STATE_TYPES)
    if not text:
        raise InvalidInput("there is no text to read; give a file (-f) or a pipe")
    with bars() as report:
        facts = drift(
            _path(options), text, kinds, options["threads"], options["limit"], notice, report
        )
    click.echo(json_text(facts) if options["as_json"] else "\n".join(drift_lines(facts)))
    return bool(facts["interrupted"])


def costs(
    path: str, roundings: Iterable[tuple[Any, ...]], file: str, threads: int
) -> list[dict[str, Any]]:
    """What each rounding of a quantization costs over the text of a file; see `report`."""
    text, wanted = _text(file), [Rounding(*parts) for parts in roundings]
    with bars() as shown:
        return report(path, wanted, text, threads, notice, shown)


def _text(file: str | None) -> str:
    """The text of a file or a pipe; empty where there is neither."""
    text = read_prompt(None, file, needed=False)
    if file not in (None, "-") and not text:
        raise InvalidInput(f"{file} is empty; give a file that holds a text")
    return text


def _check_written(options: dict[str, Any], *targets: str | None) -> None:
    """Raise InvalidInput where a file would be written over one that is read."""
    for target in filter(None, targets):
        check_target(target, [options["text_file"], options["model"], options["model_option"]])


def _open(options: dict[str, Any], **more: Any) -> Model:
    names = ("repack", "max_ram", "cache_type_k", "cache_type_v", "state_type")
    settings = {name: options[name] for name in names}
    with bars(wiped=False) as report:
        return Model(
            _path(options), options["threads"], notice=notice, progress=report, text=True,
            **settings, **more,
        )  # fmt: skip


def _path(options: dict[str, Any]) -> str:
    return named_model(options["model"], options["model_option"])
