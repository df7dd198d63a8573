"""What a sequence has read so far: a value that is passed in, advanced and handed back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.attention import TILE, decode, encode
from ..kernels.errors import InvalidInput
from ..kernels.formats.blocks import BY_NAME, F16, BlockFormat
from ..kernels.statetypes import F32, STATE_TYPES, StateType
from ..models.graph import CacheRef, Graph, StateRef

if TYPE_CHECKING:
    from .model import Model

#: Tokens a page of the KV cache holds.
PAGE_ROWS = TILE

#: Rows of a forward up to which threads share the tokens that one row reads.
SHARED_ROWS = 4

#: Types of keys and values unless others are asked for.
CACHE_TYPES = MappingProxyType({"k": F16, "v": F16})
_CACHE_NAMES = ("F16", "Q8_0", "F32")

#: Values of the kernels' vectors.
_VECTOR = 16
_LINE = 64
_HASH_PRIME = (1 << 61) - 1
_HASH_BASE = 0x1F3D5B79A2C4E687 % _HASH_PRIME


def aligned(count: int) -> np.ndarray:
    """Zeroed float32 that start on a cache line: (count,)."""
    raw = np.zeros(count * 4 + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + count * 4].view(np.float32)


@dataclass(frozen=True, slots=True)
class StatePlace:
    """Where a tensor lies in the state block: `offset` bytes from its start, on a cache line."""

    ref: StateRef
    kind: StateType
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.kind.nbytes(self.ref.shape)

    @property
    def matrix_bytes(self) -> int:
        """Bytes from one matrix of the tensor to the next."""
        return self.kind.matrix_bytes(*self.ref.shape[-2:])


@dataclass(frozen=True, slots=True)
class CachePlace:
    """Where a cache lies in every page: head after head, of each the rows of PAGE_ROWS tokens.

    block   type of the values
    offset  bytes from the start of a page
    pitch   bytes of a head's row
    """

    ref: CacheRef
    block: BlockFormat
    offset: int
    pitch: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a head's row that are not there to fill it up."""
        return self.block.row_bytes(self.ref.d_head)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in a state: the same for all sequences of a model.

    size: bytes of the state block.
    """

    states: tuple[StatePlace, ...]
    caches: tuple[CachePlace, ...]
    size: int

    @classmethod
    def of(
        cls,
        graph: Graph,
        types: Mapping[str, BlockFormat] = CACHE_TYPES,
        state_type: StateType = F32,
    ) -> Layout:
        """The layout a graph asks for; `types` are those of keys ("k") and values ("v").

        state_type: of a recurrence's matrices; windows of convolutions, which are small, stay
        float32. Raises InvalidInput for heads that do not divide into the blocks of a type.
        """
        states, size, typed = [], 0, graph.typed_states
        for state in graph.states:
            held = StatePlace(state, state_type if state in typed else F32, size)
            states.append(held)
            size += -(-held.nbytes // _LINE) * _LINE
        places, offset = [], 0
        for ref in graph.caches:
            pitch = pitch_of(ref, types[ref.kind])
            places.append(CachePlace(ref, types[ref.kind], offset, pitch))
            offset += ref.heads * PAGE_ROWS * pitch
        return cls(tuple(states), tuple(places), size)

    @property
    def fixed_bytes(self) -> int:
        """Bytes a sequence takes however long it gets."""
        return sum(place.nbytes for place in self.states)

    @property
    def bytes_per_token(self) -> int:
        """Bytes every token adds."""
        return sum(place.ref.heads * place.pitch for place in self.caches)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return PAGE_ROWS * self.bytes_per_token

    @property
    def type_names(self) -> dict[str, str]:
        """Types of keys and values, by "k" and "v"; nothing where there are none."""
        return {place.ref.kind: place.block.name.lower() for place in self.caches}

    @property
    def state_type(self) -> str:
        """Name of the type of a recurrence's matrices."""
        return next((held.kind.name for held in self.states if held.kind is not F32), F32.name)

    def held(self, ref: StateRef) -> StatePlace:
        """The place of a tensor of the state."""
        return next(held for held in self.states if held.ref == ref)

    def place(self, ref: CacheRef) -> CachePlace:
        """The place of a cache, or of a part of one."""
        return next(place for place in self.caches if place.ref.name == ref.name)


@dataclass(slots=True, eq=False)
class State:
    """A sequence's memory.

    block     uint8, all recurrent tensors and conv windows, one after another (see Layout)
    pages     KV pages of PAGE_ROWS tokens, bytes; full ones never change: copies share them
    logits    float32 (vocabulary,): those of the next token, None before the first forward
    position  tokens read; `digest` is a rolling hash of their ids
    model     fingerprint of the model that the state belongs to; numerics: what made its bits
    damaged   set where a forward failed in a way that could not be undone
    """

    layout: Layout = field(repr=False)
    model: str = field(repr=False)
    block: np.ndarray = field(repr=False)
    pages: list[np.ndarray] = field(default_factory=list, repr=False)
    logits: np.ndarray | None = field(default=None, repr=False)
    position: int = 0
    digest: int = field(default=0, repr=False)
    numerics: str = field(default="", repr=False)
    damaged: bool = False

    @classmethod
    def fresh(cls, layout: Layout, model: str, numerics: str = "") -> State:
        """The state before the first token."""
        return cls(layout, model, _lines(layout.size), numerics=numerics)

    @property
    def nbytes(self) -> int:
        """Bytes of the recurrent tensors and the KV pages."""
        return self.layout.fixed_bytes + self.position * self.layout.bytes_per_token

    def clone(self) -> State:
        """An independent copy: a fork. Costs the block, the last page and the logits."""
        full = self.position // PAGE_ROWS
        pages = self.pages[:full] + [_copied(page) for page in self.pages[full:]]
        logits = None if self.logits is None else self.logits.copy()
        return replace(self, block=_copied(self.block), pages=pages, logits=logits)

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors by name, float32, each in its canonical shape.

        Views of the block where it holds float32, else copies that cannot be written to.
        """
        return {held.ref.name: self.view(held.ref) for held in self.layout.states}

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
        """One tensor of the block, as `tensors` has it."""
        held = self.layout.held(ref)
        values = held.kind.decode(self.raw(held), *ref.shape[-2:])
        values.flags.writeable = held.kind is F32
        return values

    def raw(self, held: StatePlace) -> np.ndarray:
        """The bytes of a tensor, a view: (matrices..., bytes of a matrix) uint8."""
        data = self.block[held.offset : held.offset + held.nbytes]
        return data.reshape(*held.ref.shape[:-2], held.matrix_bytes)

    def reserve(self, rows: int) -> None:
        """Make room for the KV rows of `rows` more tokens."""
        if not self.layout.caches:
            return
        while len(self.pages) * PAGE_ROWS < self.position + rows:
            self.pages.append(_lines(self.layout.page_bytes))

    def advance(self, ids: Sequence[int]) -> None:
        """Count ids that a forward has read."""
        digest = self.digest
        for token in ids:
            digest = (digest * _HASH_BASE + token + 1) % _HASH_PRIME
        self.digest = digest
        self.position += len(ids)


class StateView:
    """A tensor of one state, as definitions use it: `values` float32, in their canonical shape."""

    def __init__(self, state: State, ref: StateRef) -> None:
        self._state, self._held = state, state.layout.held(ref)
        self.values = state.view(ref)
        if self._held.kind is not F32:
            self.values = self.values.copy()

    def keep(self, row: int) -> None:
        """Store the values behind row `row` of this forward, and go on with what is then there."""
        held = self._held
        if held.kind is not F32:
            raw = self._state.raw(held)
            raw[:] = held.kind.encode(self.values, self._state.position + row)
            self.values[:] = held.kind.decode(raw, *held.ref.shape[-2:])


class CacheView:
    """A cache of one state, as definitions use it: written once, read from the first token on."""

    def __init__(self, state: State, ref: CacheRef) -> None:
        self._state, self._ref, self._place = state, ref, state.layout.place(ref)
        self.position = state.position

    def _rows(self, page: np.ndarray) -> np.ndarray:
        """All rows of a page: (heads, PAGE_ROWS, pitch) bytes."""
        place = self._place
        size = place.ref.heads * PAGE_ROWS * place.pitch
        return page[place.offset : place.offset + size].reshape(-1, PAGE_ROWS, place.pitch)

    def write(self, rows: np.ndarray) -> None:
        """Store rows behind those that are already there: (T, heads * d_head) float32."""
        parts = rows.reshape(len(rows), self._ref.heads, self._ref.d_head)
        self.write_raw(encode(parts, self._place.block))

    def write_raw(self, rows: np.ndarray) -> None:
        """`write` for rows that have the cache's type: (T, heads, bytes) uint8."""
        for i, row in enumerate(rows, self.position):
            page = self._rows(self._state.pages[i // PAGE_ROWS])
            page[:, i % PAGE_ROWS, : rows.shape[2]] = row
            page[:, i % PAGE_ROWS, rows.shape[2] :] = 0

    def read(self, count: int) -> np.ndarray:
        """The first `count` rows of what is used: (count, heads * used) float32."""
        values = decode(self.read_raw(count), self._place.block)
        return values[:, :, : self._ref.used].reshape(count, self._ref.width)

    def read_raw(self, count: int) -> np.ndarray:
        """The first `count` rows as they are stored: (count, heads, bytes) uint8."""
        size, ref = self._place.row_bytes, self._ref
        if not count:
            return np.zeros((0, ref.heads, size), np.uint8)
        pages = self._state.pages[: -(-count // PAGE_ROWS)]
        rows = np.concatenate([self._rows(page) for page in pages], axis=1)
        return rows[:, :count, :size].swapaxes(0, 1).copy()


def cache_types(keys: str, values: str) -> dict[str, BlockFormat]:
    """Types of the KV pages by name: f16, q8_0 or f32. Raises InvalidInput for others."""
    for name in (keys, values):
        if str(name).upper() not in _CACHE_NAMES:
            raise InvalidInput(
                f"keys and values cannot be kept as {name!r}; choose f16, q8_0 or f32"
            )
    return {"k": BY_NAME[keys.upper()], "v": BY_NAME[values.upper()]}


def state_type_named(name: str) -> StateType:
    """A type of the states by name. Raises InvalidInput for others."""
    if str(name) not in STATE_TYPES:
        raise InvalidInput(f"states cannot be kept as {name!r}; choose f32, bf16 or int8")
    return STATE_TYPES[name]


def pitch_of(ref: CacheRef, block: BlockFormat) -> int:
    """Bytes of a head's row: whole vectors of the kernels, or whole blocks."""
    if block.elements == 1:
        return -(-ref.d_head // _VECTOR) * _VECTOR * block.nbytes
    if ref.d_head % block.elements:
        raise InvalidInput(
            f"heads of {ref.d_head} values do not divide into blocks of {block.name}; choose "
            "f16 or f32 for keys and values"
        )
    return block.row_bytes(ref.d_head)


def check_states(states: Sequence[State], layout: Layout, model: str) -> None:
    """Raise InvalidInput when a state is given twice or belongs to another model."""
    if len({id(state) for state in states}) != len(states):
        raise InvalidInput("the same state was given for two sequences; clone() it first")
    page_bytes = layout.page_bytes
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
        kept = [(page, page_bytes) for page in state.pages]
        for array, size in [(state.block, layout.size), *kept]:
            if array.shape != (size,) or array.dtype != np.uint8 or not array.flags.carray:
                raise InvalidInput("the state's memory was exchanged; use clone() and load()")


def _lines(nbytes: int) -> np.ndarray:
    """Bytes of zeros that start on a cache line; their number is a multiple of 4."""
    return aligned(nbytes // 4).view(np.uint8)


def _copied(data: np.ndarray) -> np.ndarray:
    copy = _lines(data.nbytes)
    copy[:] = data
    return copy
