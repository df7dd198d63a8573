"""A loaded model: `forward` advances states, `generate` writes text."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import models
from ..kernels.errors import InvalidInput, NumericalError
from .backend import MAX_ROWS, Batch, make_backend
from .info import open_file
from .state import Layout, State, check_states
from .tokenizer import Tokenizer
from .weights import WeightStore

#: Bytes of each tensor's start, middle and end that a fingerprint looks at.
_SAMPLE = 4096

Ids = Sequence[int] | np.ndarray


def print_notice(text: str) -> None:
    """Tell the user about something that was done for them."""
    print(f"keelback: {text}", file=sys.stderr, flush=True)


class Model:
    """A model file, ready to run. Calls from several threads are served one after another."""

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        backend: str = "cpu",
        notice: Callable[[str], None] = print_notice,
    ) -> None:
        self.file = open_file(path)
        self.graph = models.build(self.file.metadata, self.file.tensors, self.file.path)
        self.layout = Layout.of(self.graph)
        self.vocabulary = self.graph.logits.width if self.graph.logits else 0
        self.backend = make_backend(
            backend, self.graph, WeightStore(self.file, notice), threads, notice
        )
        self.notice = notice
        self._turn = threading.RLock()

    @property
    def metadata(self) -> Any:
        """The key-value pairs of the model file."""
        return self.file.metadata

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model file carries."""
        return Tokenizer.from_metadata(self.file.metadata, self.file.path)

    @cached_property
    def fingerprint(self) -> str:
        """Tells models apart: a hash of the header and of samples of every tensor's bytes."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(memoryview(self.file.map)[: self.file.data_start])
        for info in self.file.tensors.values():
            data = self.file.data(info)
            for start in (0, max(0, info.nbytes // 2), max(0, info.nbytes - _SAMPLE)):
                digest.update(data[start : start + _SAMPLE].tobytes())
        return digest.hexdigest()

    def new_state(self) -> State:
        """The state before the first token."""
        return State.fresh(self.layout, self.fingerprint)

    def forward(
        self,
        ids: Ids,
        state: State | None = None,
        logits: str = "last",
        progress: Callable[[int], None] | None = None,
    ) -> tuple[np.ndarray, State]:
        """Read token ids and advance the state that is given (a new one without).

        ids: integers, (T,), T >= 1. logits: "last" returns those of the next token, float32
        (vocabulary,); "all" those behind every id, (T, vocabulary). `progress` is told the number
        of ids read after each chunk. Raises InvalidInput for ids out of range, NumericalError when
        logits are not finite. A forward that fails, or is cancelled with Ctrl-C, leaves the state
        as it was before the chunk of up to MAX_ROWS ids that it was reading.
        """
        state = self.new_state() if state is None else state
        rows, (state,) = self._run([ids], [state], logits, progress)
        return rows[0], state

    def forward_batch(
        self, ids: Sequence[Ids], states: Sequence[State | None], logits: str = "last"
    ) -> tuple[list[np.ndarray], list[State]]:
        """`forward` for several sequences at once, one state each; the same bits as one by one."""
        if len(ids) != len(states) or not len(ids):
            raise InvalidInput(f"{len(ids)} sequences of ids were given with {len(states)} states")
        started = [self.new_state() if state is None else state for state in states]
        return self._run(ids, started, logits, None)

    def generate(
        self, prompt: str | Ids, limit: int | None = None, **settings: Any
    ) -> Iterator[str]:
        """Yield the text that follows a prompt, piece by piece, up to `limit` tokens.

        Settings are those of Session: temperature, top_k, seed, stop and so on.
        """
        from .session import Session

        session = Session(self, **settings)
        session.feed(prompt)
        yield from session.generate(limit)
        yield session.stream.flush()

    def _run(
        self,
        ids: Sequence[Ids],
        states: list[State],
        logits: str,
        progress: Callable[[int], None] | None,
    ) -> tuple[list[np.ndarray], list[State]]:
        if logits not in ("last", "all"):
            raise InvalidInput(f'logits={logits!r} was asked for; choose "last" or "all"')
        sequences = [self._checked(sequence) for sequence in ids]
        check_states(states, self.layout, self.fingerprint)
        with self._turn:
            collected: list[list[np.ndarray]] = [[] for _ in sequences]
            read = 0
            for chunk in _chunks([len(sequence) for sequence in sequences]):
                self._forward_chunk(sequences, states, chunk, logits == "all", collected)
                read += sum(end - start for _, start, end in chunk)
                if progress is not None:
                    progress(read)
        if logits == "all":
            return [np.concatenate(rows) for rows in collected], states
        return [rows[-1][-1].copy() for rows in collected], states

    def _forward_chunk(
        self,
        sequences: list[np.ndarray],
        states: list[State],
        chunk: list[tuple[int, int, int]],
        every: bool,
        collected: list[list[np.ndarray]],
    ) -> None:
        """Run the rows of each (sequence, start, end); all states advance, or none."""
        parts = [sequences[i][start:end] for i, start, end in chunk]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        last = [end == len(sequences[i]) for i, _, end in chunk]
        outputs = np.arange(offsets[-1]) if every else offsets[1:][last] - 1
        touched = [states[i] for i, _, _ in chunk]
        for state, part in zip(touched, parts, strict=True):
            state.reserve(len(part))
        batch = Batch(np.concatenate(parts), offsets, touched, outputs.astype(np.int64))
        rows, interrupted = self._forward_or_restore(batch)
        for position, ((i, _, _), state, part) in enumerate(
            zip(chunk, touched, parts, strict=True)
        ):
            mine = (outputs >= offsets[position]) & (outputs < offsets[position + 1])
            state.logits = None
            if mine.any():
                collected[i].append(rows[mine])
                state.logits = collected[i][-1][-1].copy()
            state.advance(part.tolist())
        if interrupted:
            raise KeyboardInterrupt

    def _forward_or_restore(self, batch: Batch) -> tuple[np.ndarray, bool]:
        """Run a batch: its logits, and whether Ctrl-C was pressed after it could be cancelled.

        When it fails or is cancelled, its states are as they were.

        A recurrent state cannot be wound back, so it is copied first; not for a single row, which
        is not cancelled and would take twice the memory traffic.
        """
        cancellable = len(batch.ids) > 1
        keep = cancellable or self.backend.preemptible
        kept = [state.block.copy() for state in batch.states] if keep else []
        try:
            done = self.backend.forward(batch, cancellable)
            if done.logits is None:
                raise KeyboardInterrupt
            if not np.isfinite(done.logits).all():
                raise NumericalError(
                    f"{self.file.path} gave logits that are not finite; "
                    "the file is damaged, or its weights overflow"
                )
        except BaseException:
            for state, block in zip(batch.states, kept, strict=False):
                state.block[:] = block
            raise
        return done.logits, done.interrupted

    def _checked(self, ids: Ids) -> np.ndarray:
        array = np.asarray(ids)
        if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
            raise InvalidInput("ids have to be a list of at least one whole number")
        if array.min() < 0 or array.max() >= self.vocabulary:
            odd = array[(array < 0) | (array >= self.vocabulary)][0]
            raise InvalidInput(
                f"the id {odd} is out of range: the model knows the ids 0 to {self.vocabulary - 1}"
            )
        return np.ascontiguousarray(array, np.int64)


def _chunks(lengths: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Cut sequences into forwards of at most MAX_ROWS rows: lists of (sequence, start, end)."""
    chunk: list[tuple[int, int, int]] = []
    room = MAX_ROWS
    for i, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(length, start + room)
            chunk.append((i, start, end))
            room -= end - start
            start = end
            if not room:
                yield chunk
                chunk, room = [], MAX_ROWS
    if chunk:
        yield chunk
