"""How the command line shows things: progress, what commands found, and the tables of `bench`."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from .wording import shown, size, typed_size

_LINE_UP_AND_CLEAR = "\x1b[A\x1b[2K"


@contextlib.contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the terminal; silent where standard error is none."""
    with bars(wiped=False) as report:
        yield lambda done, total: report(label, done, total)


@contextlib.contextmanager
def bars(wiped: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars one after another; wiped out when they are full, unless they are to stay."""
    with contextlib.ExitStack() as stack:
        current: Any = None

        def report(label: str, done: int, total: int) -> None:
            nonlocal current
            if current is None and done < total and sys.stderr.isatty():
                current = stack.enter_context(
                    click.progressbar(length=total, label=label, file=sys.stderr)
                )
            if current is not None:
                current.label = label
                current.update(done - current.pos)
                if done >= total:
                    current = None
                    stack.close()
                    sys.stderr.write(_LINE_UP_AND_CLEAR if wiped else "")

        yield report


def written(path: Path) -> str:
    """A file that was written, and its size."""
    return f"{shown(path)}: {size(path.stat().st_size)}"


def json_text(facts: Any) -> str:
    """Facts as JSON; a number that is not finite, for which JSON has no word, is null."""
    return json.dumps(_finite(facts), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_PLANNED = {
    "panels": "weights, rearranged",
    "mapped": "weights, mapped as they are",
    "converted": "weights, widened to F16",
    "vectors": "weights, float32 vectors",
    "twice": "weights, being rearranged",
    "arena": "arena: rows of a forward",
    "scratch": "scratch of all threads",
    "state": "states",
    "cache": "keys and values",
    "shared": "sums that threads share",
    "copies": "states' copies, reading",
    "logits": "logits",
    "tokenizer": "tokenizer",
    "interpreter": "Python and kernels",
}


def described(facts: dict[str, Any]) -> str:
    """What a model file holds, a line for each fact and each tensor."""
    lines = []
    for name, value in facts.items():
        if name == "tensors":
            lines.append(f"{name}:")
            lines += [f"  {shown(t['name']):32} {t['type']:6} {t['shape']}" for t in value]
        else:
            lines.append(f"{name.replace('_', ' '):18} {_fact(value)}")
    return "\n".join(lines)


def _fact(value: Any) -> str:
    """A fact in words."""
    match value:
        case None:
            return "unknown"
        case bool():
            return "yes" if value else "no"
        case dict():
            return ", ".join(f"{key} {_fact(inner)}" for key, inner in value.items())
    return shown(value) or "none"


def checked(files: Iterable[dict[str, Any]]) -> str:
    """The problems of each file, or a line that says there are none."""
    return "\n".join(
        "\n".join(facts["problems"])
        or f"{shown(facts['file'])}: ok, {facts['tensors']} tensors, {size(facts['bytes'])}"
        for facts in files
    )


def planned(facts: dict[str, Any]) -> str:
    """What `plan` found, a line each."""
    fixed = typed_size(facts["state_bytes"], facts["state_type"])
    token = size(facts["state_bytes_per_token"])
    available = facts["available_bytes"]
    lines = [
        f"{shown(facts['file'])}: {size(facts['file_bytes'])}",
        f"{facts['sequences']} x {facts['context']} tokens, {facts['threads']} threads; "
        f"a state is {fixed} + {token} per token",
        *(f"  {_PLANNED[name]:28} {size(count):>12}" for name, count in facts["bytes"].items()),
        f"{'sum, reading a prompt':30} {size(facts['total_bytes']):>12}",
        f"{'of which cannot be given back':30} {size(facts['held_bytes']):>12}",
        f"{'peak, loading included':30} {size(facts['peak_bytes']):>12}",
        f"{'available':30} {'unknown' if available is None else size(available):>12}",
    ]
    return "\n".join(lines)


def quantized(facts: dict[str, Any], tensors: bool) -> str:
    """What `quantize` did or would do: each tensor if wanted, and the sizes."""
    rows = [
        f"{shown(t['name']):40} {t['type_before']:>6} -> {t['type']:6} {size(t['bytes']):>12}"
        for t in facts["tensors"]
    ]
    sizes = (
        f"{size(facts[f'bytes{when}'])} ({facts[f'bits_per_weight{when}']:.2f} bits per weight)"
        for when in ("_before", "")
    )
    last = f"{shown(facts['file'])}: {facts['type']}, {' -> '.join(sizes)}"
    return "\n".join([*rows * tensors, *_costs(facts.get("report", [])), last])


def _costs(rows: list[dict[str, Any]]) -> list[str]:
    """What each tensor's type costs over a text, a line a tensor."""
    lines = [f"{'tensor':40} {'type':6} {'size':>12} {'error':>8} {'KL':>20} {'state':>8}"]
    for row in rows:
        divergence = f"{row['kl']:.6f} ± {row['kl_error']:.6f}"
        lines.append(
            f"{shown(row['name']):40} {row['type']:6} {size(row['bytes']):>12} "
            f"{row['error']:8.3%} {divergence:>20} {row['state_error']:8.3%}"
        )
    return lines if rows else []


def listed(rows: list[dict[str, Any]]) -> str:
    """What `ls` found, a line a model: name, size, date, revision, path."""
    width = max((len(row["name"]) for row in rows), default=0)
    lines = [
        f"{row['name']:{width}}  {size(row['bytes']):>10}  {row['date'][:10]:10}  "
        f"{row['revision'][:8]:8}  {shown(row['path'])}"
        for row in rows
    ]
    return "\n".join(lines) or "nothing has been pulled yet"


def print_rows(rows: Iterable[dict[str, Any]], form: str) -> None:
    """Print rows of `bench` as "md", "csv", "json" or "jsonl"; all but json as they come."""
    if form == "json":
        click.echo(json_text(list(rows)))
        return
    for i, row in enumerate(rows):
        if form == "jsonl":
            click.echo(json.dumps(row))
        elif form == "csv":
            plain = {key: value for key, value in row.items() if not isinstance(value, list)}
            click.echo("\n".join([_csv(plain.keys())] * (not i) + [_csv(plain.values())]))
        else:
            click.echo("\n".join(_HEAD * (not i) + [_markdown(row)]))


_COLUMNS = {
    "model": 30, "size": 11, "params": 9, "threads": 7, "test": 16, "t/s": 18, "GB/s": 6,
    "reached": 7, "first token": 11, "peak": 11, "state": 11,
}  # fmt: skip
_LEFT = {"model"}
_HEAD = [
    "| " + " | ".join(_column.ljust(width) if _column in _LEFT else _column.rjust(width)
                      for _column, width in _COLUMNS.items()) + " |",
    "| " + " | ".join("-" * width if _column in _LEFT else "-" * (width - 1) + ":"
                      for _column, width in _COLUMNS.items()) + " |",
]  # fmt: skip


def _markdown(row: dict[str, Any]) -> str:
    share, peak = row["bandwidth_share"], row["peak_rss"]
    job = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
    state = typed_size(row["state_bytes"], row["state_type"])
    cells = [
        row["model_type"],
        size(row["model_size"]),
        f"{row['model_n_params'] / 1e6:.2f} M",
        str(row["n_threads"]),
        f"{job} @ d{row['n_depth']}" if row["n_depth"] else job,
        f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
        f"{row['bandwidth_gbs']:.1f}",
        f"{share:.0%}" if share is not None else "",
        f"{row['first_token_ms']:.0f} ms",
        size(peak) if peak is not None else "",
        f"{state} + {size(row['state_bytes_per_token'])}/token"
        if row["state_bytes_per_token"]
        else state,
    ]
    padded = [
        cell.ljust(width) if column in _LEFT else cell.rjust(width)
        for cell, (column, width) in zip(cells, _COLUMNS.items(), strict=True)
    ]
    return f"| {' | '.join(padded)} |"


def _csv(values: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="").writerow(values)
    return line.getvalue()
