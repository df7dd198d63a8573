"""`keelback perplexity`: a model file and a text become figures.

What a Ctrl-C leaves is figures too, of what has been read until then.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidInput, printable
from ..kernels.files import check_target
from .backend import MAX_ROWS, Progress
from .curve import Bucket, check_picture, curve, draw
from .divergence import diverge, summary
from .logits_file import LogitsFile, LogitsWriter, Text, reading, writing
from .model import Model
from .perplexity import (
    SMALLEST_CHUNK,
    Estimate,
    Rows,
    carried,
    chunked,
    chunks_of,
    estimate,
    ids_of,
    likelihoods,
    rows_at_once,
)

#: Tokens of a chunk where only --chunks is given: llama.cpp's number.
CHUNK = 512

#: Told the number of a chunk, and the perplexity of all up to its end.
Listed = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class Task:
    """What to measure. `base` is a file of logits: one to write, or to `compare` with.

    A text is read in one pass, and of it the first `tokens`, unless `chunk` or `chunks` is given:
    chunks of that many tokens, and so many of them.
    """

    text: str = ""
    chunk: int | None = None
    chunks: int | None = None
    tokens: int | None = None
    batch: int = MAX_ROWS
    base: str | None = None
    compare: bool = False
    plot: str | None = None
    even: bool = False

    def check(self) -> None:
        """Raise InvalidInput for what cannot be meant, before a model is loaded."""
        for flag, value, least in ("--chunks", self.chunks, 1), ("--tokens", self.tokens, 2):
            if value is not None and value < least:
                raise InvalidInput(f"{flag} {value} measures nothing; give {least} or more")
        if self.chunk is not None and self.chunk < SMALLEST_CHUNK:
            raise InvalidInput(
                f"chunks of {self.chunk} tokens have no second half to count; give -c "
                f"{SMALLEST_CHUNK} or more"
            )
        if self.chunk_size is not None and self.tokens is not None:
            raise InvalidInput("--tokens is for one pass; with chunks, give --chunks their number")
        if self.compare and self.base is None:
            raise InvalidInput("--kl-divergence needs the file of a --kl-divergence-base")
        if not self.compare and not self.text:
            raise InvalidInput("there is no text to measure; give a file (-f) or a pipe")
        if self.plot is not None:
            check_picture(self.plot)
        if self.base is not None and not self.compare:
            check_target(self.base)

    @property
    def chunk_size(self) -> int | None:
        """Tokens of a chunk; None for one pass."""
        return CHUNK if self.chunk is None and self.chunks is not None else self.chunk


@dataclass(slots=True)
class Measurement:
    """What has been measured so far: parts in the order of the text.

    parts   (2, R) each: positions and negative log-likelihoods; against a base (5, R), the
            likelihoods followed by what else `diverge` returns. A Ctrl-C adds all of a part or none
    chunks  the estimates at the end of each
    """

    text: Text
    parts: list[np.ndarray] = field(default_factory=list)
    chunks: list[Estimate] = field(default_factory=list)
    interrupted: bool = False
    count: int = 0
    _total: float = 0.0
    _squares: float = 0.0

    @property
    def running(self) -> Estimate:
        """Of what there is so far, from sums."""
        mean = self._total / self.count
        variance = max(0.0, self._squares / self.count - mean * mean)
        return Estimate(self.count, mean, math.sqrt(variance / max(1, self.count - 1)))

    def add(self, rows: Rows, base: LogitsFile | None) -> None:
        """Count rows, against the next ones of a base where there is one."""
        if base is None:
            values = likelihoods(rows.logits, rows.targets)[None]
        else:
            values = diverge(rows.logits, base.read(len(rows.targets)), rows.targets)
        first = rows.first % self.text.size if self.text.size else rows.first
        positions = first + np.arange(len(rows.targets))
        self.parts.append(np.concatenate([positions[None], values]))
        self.count += len(positions)
        self._total += float(values[0].sum())
        self._squares += float(np.square(values[0]).sum())

    def end_chunk(self) -> bool:
        """Whether a chunk has come to its end; its running estimate is then kept."""
        size = self.text.size
        if size is None or self.count // (size - 1 - size // 2) == len(self.chunks):
            return False
        self.chunks.append(self.running)
        return True


def evaluate(
    model: Model, task: Task, progress: Progress, listed: Listed | None = None
) -> dict[str, Any]:
    """Measure, draw, and return all figures, ready for JSON.

    Where the text is read in chunks, `listed` is told the number of each and the perplexity up to
    its end; `progress` is then left alone. Raises InvalidInput for a text that is too short or of
    another vocabulary, KeyboardInterrupt where Ctrl-C leaves no figure.
    """
    with contextlib.ExitStack() as stack:
        base = None
        if task.compare and task.base is not None:
            base = stack.enter_context(reading(task.base))
        text = _text(model, task) if base is None else _text_of(base, model, task)
        measured = Measurement(text)
        try:
            _measure(model, task, base, measured, progress, listed)
        except KeyboardInterrupt:
            if not measured.parts:
                raise
            measured.interrupted = True
    return _facts(model, task, measured)


def _text(model: Model, task: Task) -> Text:
    """The tokens that are asked for; control tokens that the text spells are plain text."""
    size = task.chunk_size
    if size is None:
        ids = ids_of(model, task.text)[: task.tokens]
    else:
        ids = chunks_of(model, task.text, size, task.chunks).reshape(-1)
    return _checked(Text(ids, model.vocabulary, size))


def _text_of(base: LogitsFile, model: Model, task: Task) -> Text:
    """The tokens of a base, or its first chunks."""
    text = base.text
    if text.vocabulary != model.vocabulary:
        raise InvalidInput(
            f"{base.path} is of {text.vocabulary} tokens, and {model.file.path} has "
            f"{model.vocabulary}; compare models of one vocabulary"
        )
    if text.size is None and task.chunk_size is not None:
        raise InvalidInput(f"{base.path} was written for one pass; leave -c and --chunks out")
    if text.size is not None and (task.tokens or task.chunk not in (None, text.size)):
        raise InvalidInput(
            f"{base.path} was written for chunks of {text.size}; leave -c and --tokens out"
        )
    wanted = task.tokens if text.size is None else task.chunks and task.chunks * text.size
    return _checked(Text(text.ids[:wanted], text.vocabulary, text.size))


def _checked(text: Text) -> Text:
    if text.rows < 1:
        raise InvalidInput(
            f"the text has {len(text.ids)} tokens, too few to measure with; give one of "
            f"{text.size or 2} or more"
        )
    return text


def _measure(
    model: Model,
    task: Task,
    base: LogitsFile | None,
    measured: Measurement,
    progress: Progress,
    listed: Listed | None,
) -> None:
    text = measured.text
    step = rows_at_once(model.vocabulary, task.batch)
    if text.size is None:
        source = carried(model, text.ids, step)
    else:
        source = chunked(model, text.ids, text.size, step)
    shown = listed is None or text.size is None
    if shown:
        progress("reading", 0, text.rows)
    with _writer(task, text) as writer:
        for rows in source:
            measured.add(rows, base)
            if writer is not None:
                writer.add(rows.logits)
            if measured.end_chunk() and listed is not None:
                listed(len(measured.chunks), measured.chunks[-1].ppl)
            if shown:
                so_far = measured.running
                label = f"PPL {so_far.ppl:.4f} ± {so_far.ppl_error:.4f}"
                progress(label, measured.count, text.rows)


@contextlib.contextmanager
def _writer(task: Task, text: Text) -> Iterator[LogitsWriter | None]:
    if task.base is None or task.compare:
        yield None
        return
    with writing(task.base, text) as writer:
        yield writer


def _facts(model: Model, task: Task, measured: Measurement) -> dict[str, Any]:
    positions, *values = np.concatenate(measured.parts, axis=1)
    total, buckets = estimate(values[0]), curve(positions, values[0], task.even)
    compared = len(values) > 1
    if task.plot is not None:
        lines = {"": buckets}
        if compared:
            lines = {"model": buckets, "base": curve(positions, values[1], task.even)}
        name = printable(Path(model.file.path).name)
        draw(task.plot, f"{name}: nats a token, {total.mean:.4f} in all", lines)
    return {
        "model": str(model.file.path),
        "mode": "carried" if measured.text.size is None else "chunks",
        "ctx_size": measured.text.size,
        "tokens": len(measured.text.ids),
        "scored": total.count,
        "interrupted": measured.interrupted,
        "nll": total.mean,
        "nll_error": total.error,
        "ppl": total.ppl,
        "ppl_error": total.ppl_error,
        "chunks": [running.ppl for running in measured.chunks],
        "curve": [_point(bucket) for bucket in buckets],
        "divergence": summary(np.array(values)) if compared else None,
    }


def _point(bucket: Bucket) -> dict[str, Any]:
    found = bucket.estimate
    return {
        "first": bucket.first,
        "last": bucket.last,
        "count": found.count,
        "nll": found.mean,
        "nll_error": found.error,
    }
