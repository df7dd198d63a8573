"""What a sequence has read so far: a value that is passed in, advanced and handed back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.errors import InvalidInput
from ..models.graph import CacheRef, Graph, StateRef

if TYPE_CHECKING:
    from .model import Model

#: Tokens a page of the KV cache holds.
PAGE_ROWS = 64

_LINE = 64
_HASH_PRIME = (1 << 61) - 1
_HASH_BASE = 0x1F3D5B79A2C4E687 % _HASH_PRIME


def aligned(count: int) -> np.ndarray:
    """Zeroed float32 that start on a cache line: (count,)."""
    raw = np.zeros(count * 4 + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + count * 4].view(np.float32)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in a state: the same for all sequences of a model."""

    states: tuple[StateRef, ...]
    caches: tuple[CacheRef, ...]
    size: int
    cache_width: int

    @classmethod
    def of(cls, graph: Graph) -> Layout:
        """The layout a graph asks for."""
        return cls(tuple(graph.states), tuple(graph.caches), graph.state_size, graph.cache_width)

    @property
    def fixed_bytes(self) -> int:
        """Bytes a sequence takes however long it gets."""
        return sum(ref.size for ref in self.states) * 4

    @property
    def bytes_per_token(self) -> int:
        """Bytes every token adds."""
        return self.cache_width * 4


@dataclass(slots=True, eq=False)
class State:
    """A sequence's memory.

    block     float32, all recurrent tensors and conv windows, one after another (see Layout)
    pages     KV pages of PAGE_ROWS tokens; full ones are never written again: copies share them
    logits    float32 (vocabulary,): those of the next token, None before the first forward
    position  tokens read; `digest` is a rolling hash of their ids
    model     fingerprint of the model that the state belongs to; numerics: what made its bits
    damaged   set where a forward failed in a way that could not be undone
    """

    layout: Layout
    model: str
    block: np.ndarray = field(repr=False)
    pages: list[np.ndarray] = field(default_factory=list, repr=False)
    logits: np.ndarray | None = field(default=None, repr=False)
    position: int = 0
    digest: int = 0
    numerics: str = ""
    damaged: bool = False

    @classmethod
    def fresh(cls, layout: Layout, model: str, numerics: str = "") -> State:
        """The state before the first token."""
        return cls(layout, model, aligned(layout.size), numerics=numerics)

    @property
    def nbytes(self) -> int:
        """Bytes of the recurrent tensors and the KV pages."""
        return self.layout.fixed_bytes + self.position * self.layout.bytes_per_token

    def clone(self) -> State:
        """An independent copy: a fork of the sequence. Costs the block and the last page."""
        full = self.position // PAGE_ROWS
        pages = self.pages[:full] + [_copied(page) for page in self.pages[full:]]
        return replace(self, block=_copied(self.block), pages=pages)

    def tensors(self) -> dict[str, np.ndarray]:
        """Views of the block by tensor name, each in its canonical shape."""
        return {ref.name: self.view(ref) for ref in self.layout.states}

    def save(self, path: str | Path) -> None:
        """Write the state to a file, as a snapshot without a conversation."""
        from .snapshot import Snapshot

        Snapshot(self).save(path)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> State:
        """Read a state of this model back; raises InvalidFile where `Snapshot.load` does."""
        from .snapshot import Snapshot

        return Snapshot.load(path, model).state

    def view(self, ref: StateRef) -> np.ndarray:
        """One tensor of the block."""
        return self.block[ref.offset : ref.offset + ref.size].reshape(ref.shape)

    def reserve(self, rows: int) -> None:
        """Make room for the KV rows of `rows` more tokens."""
        if not self.layout.cache_width:
            return
        while len(self.pages) * PAGE_ROWS < self.position + rows:
            self.pages.append(aligned(PAGE_ROWS * self.layout.cache_width))

    def advance(self, ids: Sequence[int]) -> None:
        """Count ids that a forward has read."""
        digest = self.digest
        for token in ids:
            digest = (digest * _HASH_BASE + token + 1) % _HASH_PRIME
        self.digest = digest
        self.position += len(ids)


class CacheView:
    """Columns of a state's KV pages, as definitions use them: written once, read from row 0."""

    def __init__(self, state: State, ref: CacheRef) -> None:
        self._state, self._ref = state, ref
        self.position = state.position

    def _columns(self, page: np.ndarray) -> np.ndarray:
        start = PAGE_ROWS * self._ref.offset
        return page[start : start + PAGE_ROWS * self._ref.width].reshape(PAGE_ROWS, self._ref.width)

    def write(self, rows: np.ndarray) -> None:
        """Store the rows of this forward behind those already there: (T, width)."""
        for i, row in enumerate(rows, self.position):
            self._columns(self._state.pages[i // PAGE_ROWS])[i % PAGE_ROWS] = row

    def read(self, count: int) -> np.ndarray:
        """The first `count` rows: (count, width)."""
        return np.concatenate([self._columns(page) for page in self._state.pages])[:count]


def check_states(states: Sequence[State], layout: Layout, model: str) -> None:
    """Raise InvalidInput when a state is given twice or belongs to another model."""
    if len({id(state) for state in states}) != len(states):
        raise InvalidInput("the same state was given for two sequences; clone() it first")
    for state in states:
        if not isinstance(state, State):
            raise InvalidInput(f"a State is needed, not {type(state).__name__}")
        if state.model != model or state.layout != layout:
            raise InvalidInput(
                "the state belongs to another model; start a new one or load that model"
            )
        if state.damaged:
            raise InvalidInput("a forward failed in this state; go on from an earlier copy of it")
        # Kernels write to these addresses.
        pages = [(page, PAGE_ROWS * layout.cache_width) for page in state.pages]
        for array, size in [(state.block, layout.size), *pages]:
            if array.shape != (size,) or array.dtype != np.float32 or not array.flags.carray:
                raise InvalidInput("the state's memory was exchanged; use clone() and load()")


def _copied(page: np.ndarray) -> np.ndarray:
    copy = aligned(len(page))
    copy[:] = page
    return copy
