"""A loaded model: `forward` advances states, `generate` writes text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import models
from ..kernels.errors import InvalidInput, NumericalError
from ..models.graph import Graph
from .backend import MAX_ROWS, Batch, Progress, make_backend
from .footprint import admission, fits_panels
from .info import open_file, tokenizer_of
from .state import Layout, State, cache_types, check_states, state_type_named
from .threads import CancelFlag, Early, pool
from .tokenizer import Tokenizer
from .weights import WeightStore
from .wording import notice

#: Bytes of each tensor's start, middle and end that a fingerprint looks at.
_SAMPLE = 4096

Ids = Sequence[int] | np.ndarray


class Model:
    """A model file, ready to run. Calls from several threads are served one after another."""

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        backend: str = "cpu",
        notice: Callable[[str], None] = notice,
        progress: Progress | None = None,
        repack: bool | None = None,
        max_ram: str | int | None = None,
        text: bool = False,
        context: int = 0,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        amend: Callable[[Graph], None] | None = None,
        state_type: str = "f32",
    ) -> None:
        """See `keelback.load`; `notice` and `progress` are told of what takes time.

        `amend` may add ops to the model's graph, such as look at what is computed.

        With `text` the tokenizer, which is sure to be used, is built while the weights are loaded;
        what is not loaded when it is ready is with the tokens to come.
        """
        if type(context) is not int or context < 0:
            raise InvalidInput(f"a context of {context!r} tokens cannot be kept; give 0 or more")
        if max_ram is not None and backend != "cpu":
            raise InvalidInput("memory is planned for the cpu backend only; leave --max-ram out")
        self.file = open_file(path)
        self.graph = models.build(self.file.metadata, self.file.tensors, self.file.path)
        if amend is not None:
            amend(self.graph)
        types = cache_types(cache_type_k, cache_type_v)
        self.layout = Layout.of(self.graph, types, state_type_named(state_type))
        # What has a fixed size needs no limit.
        self.context = context if self.layout.caches else 0
        admit = admission(Path(path), max_ram, self.context)
        self.vocabulary = self.graph.logits.width if self.graph.logits else 0
        if repack is None:
            repack = fits_panels(self.graph)
            if not repack and backend == "cpu":
                notice("weights stay in the file, for memory is short: this takes longer")
        store = WeightStore(self.file, notice, repack)
        self.backend = make_backend(
            backend, self.graph, store, self.layout, threads, notice, progress, admit
        )
        build = partial(tokenizer_of, self.file, self.vocabulary)
        self._tokenizer: Callable[[], Tokenizer] = build
        if text:
            self._tokenizer = tokenizer = Early(build)
            self.backend.load(tokenizer.ready)
        else:
            self.backend.load()
        self.notice = notice
        self.file.release_all()

    @property
    def metadata(self) -> Any:
        """The key-value pairs of the model file."""
        return self.file.metadata

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model file carries; raises InvalidFile for one of another size."""
        return self._tokenizer()

    @cached_property
    def fingerprint(self) -> str:
        """Tells models apart: a hash of the header and of samples of every tensor's bytes."""
        digest = hashlib.blake2b(digest_size=16)
        for header in self.file.headers:
            digest.update(header)
        for info in self.file.tensors.values():
            data = self.file.data(info)
            for start in (0, max(0, info.nbytes // 2), max(0, info.nbytes - _SAMPLE)):
                digest.update(data[start : start + _SAMPLE].tobytes())
            self.file.release(info)
        return digest.hexdigest()

    def new_state(self) -> State:
        """The state before the first token."""
        return State.fresh(self.layout, self.fingerprint, self.backend.numerics)

    def forward(
        self,
        ids: Ids,
        state: State | None = None,
        logits: str = "last",
        progress: Callable[[int], None] | None = None,
        cancel: CancelFlag | None = None,
    ) -> tuple[np.ndarray, State]:
        """Read token ids and advance the state that is given (a new one without).

        ids: integers, (T,), T >= 1. logits: "last" returns those of the next token, float32
        (vocabulary,); "all" those behind every id, (T, vocabulary). `progress` is told the number
        of ids read after each chunk. Raises InvalidInput for ids out of range, NumericalError when
        logits are not finite, KeyboardInterrupt when Ctrl-C or `cancel` ends it. The state is then
        as it was before the chunk of up to MAX_ROWS ids that was being read. But a chunk of one id
        is always read to its end, which `state.position` then shows; where it leads to no finite
        logits, the state is damaged, and it is refused from then on.
        """
        state = self.new_state() if state is None else state
        cancel = CancelFlag() if cancel is None else cancel
        rows, (state,) = self._run([ids], [state], logits, progress, cancel)
        return rows[0], state

    def forward_batch(
        self, ids: Sequence[Ids], states: Sequence[State | None], logits: str = "last"
    ) -> tuple[list[np.ndarray], list[State]]:
        """`forward` for several sequences at once, one state each; the same bits as one by one."""
        if len(ids) != len(states) or not len(ids):
            raise InvalidInput(f"{len(ids)} sequences of ids were given with {len(states)} states")
        started = [self.new_state() if state is None else state for state in states]
        return self._run(ids, started, logits, None, CancelFlag())

    def generate(
        self, prompt: str | Ids, limit: int | None = None, **settings: Any
    ) -> Iterator[str]:
        """Yield the text that follows a prompt, piece by piece, up to `limit` tokens.

        Settings are those of Session: temperature, top_k, stop and so on. Without a seed the text
        is the same every time. Raises InvalidInput for settings out of their range.
        """
        from .session import Session

        session = Session(self, **settings)
        session.feed(prompt)
        yield from session.generate(limit)
        if held := session.stream.flush():
            yield held

    def _run(
        self,
        ids: Sequence[Ids],
        states: list[State],
        logits: str,
        progress: Callable[[int], None] | None,
        cancel: CancelFlag,
    ) -> tuple[list[np.ndarray], list[State]]:
        if logits not in ("last", "all"):
            raise InvalidInput(f'logits={logits!r} was asked for; choose "last" or "all"')
        sequences = [self.checked_ids(sequence) for sequence in ids]
        every, read = logits == "all", 0
        out = [
            np.empty((len(ids) if every else 1, self.vocabulary), np.float32) for ids in sequences
        ]
        with pool().turn:
            check_states(states, self.layout, self.fingerprint)
            self._check_room(sequences, states)
            for chunk in _chunks([len(sequence) for sequence in sequences]):
                body = partial(self._forward_chunk, sequences, states, chunk, out, every, cancel)
                pool().call(body, cancel)
                read += sum(end - start for _, start, end in chunk)
                if progress is not None:
                    progress(read)
        return (out if every else [rows[0] for rows in out]), states

    def room(self, state: State) -> int | None:
        """How many tokens a state can still read; None where there is no end."""
        return self.context - state.position if self.context else None

    def _check_room(self, sequences: list[np.ndarray], states: list[State]) -> None:
        for ids, state in zip(sequences, states, strict=True):
            room = self.room(state)
            if room is not None and len(ids) > room:
                read = f" behind {state.position} that were read" if state.position else ""
                raise InvalidInput(
                    f"the prompt has {len(ids)} tokens{read}, the context {self.context}; "
                    "give a larger context (-c) or a shorter prompt"
                )

    def _forward_chunk(
        self,
        sequences: list[np.ndarray],
        states: list[State],
        chunk: list[tuple[int, int, int]],
        out: list[np.ndarray],
        every: bool,
        cancel: CancelFlag,
    ) -> None:
        """Run the rows of each (sequence, start, end): all states advance, or none does."""
        touched = [states[i] for i, _, _ in chunk]
        parts = [sequences[i][start:end] for i, start, end in chunk]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        wanted = [
            np.arange(first, after)
            if every
            else np.arange(after - (end == len(sequences[i])), after)
            for (i, _, end), first, after in zip(chunk, offsets, offsets[1:], strict=False)
        ]
        for state, part in zip(touched, parts, strict=True):
            state.reserve(len(part))
        batch = Batch(np.concatenate(parts), offsets, touched, np.concatenate(wanted))
        rows, at = self._forward_or_restore(batch, cancel), 0
        for (i, start, _), state, part, mine in zip(chunk, touched, parts, wanted, strict=True):
            state.advance(part.tolist())
            state.logits = None
            if len(mine):
                state.logits = rows[at + len(mine) - 1].copy()
                first = start if every else 0
                out[i][first : first + len(mine)] = rows[at : at + len(mine)]
            at += len(mine)

    def _forward_or_restore(self, batch: Batch, cancel: CancelFlag) -> np.ndarray:
        """Run a batch and return its logits; where it fails, states are as they were, or marked.

        A recurrent state cannot be wound back, so it is copied first; not the state before the
        first token, which is zeros, and not for a single row, which is not cancelled, and for which
        a copy would double the memory traffic of the state.
        """
        several = len(batch.ids) > 1
        kept: list[Any] = [
            state.block.copy() if several and state.position else 0 for state in batch.states
        ]
        try:
            logits = self.backend.forward(batch, cancel if several else None)
            if logits is None:
                raise KeyboardInterrupt
            if not np.isfinite(logits).all():
                raise NumericalError(
                    f"{self.file.path} gave logits that are not finite; "
                    "the file is damaged, or its weights overflow"
                )
        except BaseException:
            if several:
                for state, block in zip(batch.states, kept, strict=True):
                    state.block[:] = block
            batch.states[0].damaged = not several
            raise
        return logits

    def checked_ids(self, ids: Ids) -> np.ndarray:
        """A copy of the ids as int64 (T,); raises InvalidInput unless the model knows them all."""
        try:
            array = np.array(ids)
        except ValueError:
            array = np.empty(0)
        if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
            raise InvalidInput("ids have to be a list of at least one whole number")
        if array.min() < 0 or array.max() >= self.vocabulary:
            odd = array[(array < 0) | (array >= self.vocabulary)][0]
            raise InvalidInput(
                f"the id {odd} is out of range: the model knows the ids 0 to {self.vocabulary - 1}"
            )
        return array.astype(np.int64)


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
