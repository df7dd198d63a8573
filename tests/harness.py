"""A backend without a file: weights from arrays, states from arrays, rows from a table.

A graph under test gets its input rows from an F32 embedding that holds them, so that they arrive as
column views of a wider buffer, exactly as the ops of a model see theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from randomblocks import RANDOM, halves, random_blocks

from keelback.engine.backend import MAX_ROWS, Batch
from keelback.engine.cpu import CpuBackend
from keelback.engine.reference import NumpyBackend
from keelback.engine.state import CacheView, Layout, State
from keelback.engine.weights import WeightStore
from keelback.kernels.formats import blocks
from keelback.kernels.formats.gguf import TensorInfo
from keelback.kernels.op import GIVEN, Op, Weight
from keelback.kernels.statetypes import F32, StateType
from keelback.models.graph import Graph

#: Types of keys and values unless a case has others.
KEPT = MappingProxyType({"k": blocks.F32, "v": blocks.F32})

#: Floats between the columns that two operands use, so that no row is as wide as its buffer.
GAP = 3


def encoded(values: np.ndarray, block: blocks.BlockFormat) -> np.ndarray:
    """Values as `block`; any valid blocks where the format has no reference encoder."""
    if block.name not in RANDOM:
        return np.ascontiguousarray(blocks.quantize(values, block))
    random = np.random.default_rng(values.shape)
    data = random_blocks(random, block.name, values.size // block.elements)
    for at in halves(block.name):
        scales = data[:, at : at + 2].copy().view(np.float16)
        scales *= random.uniform(-1.5, 1.5, scales.shape).astype(np.float16)
        data[:, at : at + 2] = scales.view(np.uint8)
    return data


class Tensors:
    """What a WeightStore needs of a file, in memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._data: dict[str, np.ndarray] = {}

    def add(
        self,
        name: str,
        values: np.ndarray,
        block: blocks.BlockFormat = blocks.F32,
        raw: np.ndarray | None = None,
    ) -> Weight:
        """Keep values, encoded as `block`, or raw blocks of their shape; returns what a graph
        knows of them."""
        data = (encoded(values, block) if raw is None else raw).view(np.uint8).reshape(-1)
        self._data[name] = data
        self.tensors[name] = TensorInfo(name, values.shape, block, 0, data.size)
        return Weight(name, values.shape, block)

    def data(self, info: TensorInfo) -> np.ndarray:
        return self._data[info.name]

    def release(self, info: TensorInfo, start: int = 0, end: int | None = None) -> None:
        """There are no pages to give back."""


def poison(backend: Any) -> None:
    """Fill memory that nothing is kept in: what was right in the last forward must not stand in."""
    if hasattr(backend, "_arena"):
        backend._arena.fill(np.nan)
        backend._scratch.fill(255)
        backend._partials.fill(255)


def no_notice(text: str) -> None:
    """Backends tell the user about compilation; tests do not."""


def memory(state: State) -> bytes:
    """All that a state remembers: its block, and the KV rows of the tokens that it has read."""
    caches = state.layout.caches
    rows = [CacheView(state, at.ref).read_raw(state.position) for at in caches if state.pages]
    return b"".join(array.tobytes() for array in (state.block, *rows))


@dataclass
class Played:
    """What a forward left behind: logits (R, vocabulary), each sequence's block, and its tensors
    in float32, and KV rows."""

    rows: np.ndarray
    blocks: list[np.ndarray]
    tensors: list[dict[str, np.ndarray]]
    cached: list[np.ndarray]

    def same_bits(self, other: Played) -> bool:
        memory = zip(self.blocks + self.cached, other.blocks + other.cached, strict=True)
        pairs = [(self.rows, other.rows), *memory]
        return all(np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in pairs)


class Machine:
    """A finished graph on one backend; runs batches and advances states as `Model` does."""

    def __init__(
        self,
        graph: Graph,
        tensors: Tensors,
        backend: str = "cpu",
        repack: bool = True,
        types: Mapping[str, blocks.BlockFormat] = KEPT,
        state_type: StateType = F32,
    ) -> None:
        store = WeightStore(tensors, no_notice, repack)
        self.layout = Layout.of(graph, types, state_type)
        self.backend: Any
        if backend == "numpy":
            self.backend = NumpyBackend(graph, store)
        else:
            self.backend = CpuBackend(graph, store, self.layout, 1, no_notice)
        self.backend.load()

    def fresh(self) -> State:
        return State.fresh(self.layout, "harness")

    def forward(
        self,
        ids: Sequence[Sequence[int]],
        states: Sequence[State],
        outputs: np.ndarray | None = None,
    ) -> np.ndarray:
        """Advance the states; logits of `outputs`, of all rows without."""
        lengths = [len(part) for part in ids]
        total = sum(lengths)
        assert total <= MAX_ROWS
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        outputs = np.arange(total) if outputs is None else np.asarray(outputs)
        for state, length in zip(states, lengths, strict=True):
            state.reserve(length)
        joined = np.concatenate(ids).astype(np.int64)
        batch = Batch(joined, offsets, states, outputs.astype(np.int64))
        rows = self.backend.forward(batch)
        for state, part in zip(states, ids, strict=True):
            state.advance([int(token) for token in part])
        return rows


@dataclass
class Case:
    """One op on one set of shapes.

    rows     operand slot -> (T, width) float32
    weights  operand slot -> values, or (values, type)
    raw      operand slot -> the blocks of such a type, in place of encoded values
    states   operand slot -> (sequences, *shape) float32: what each sequence starts with
    caches   operand slot -> what each sequence's KV pages hold, (count, width) float32 each
    heads    that share a row of a cache
    first    where values are the first ones of every key's head: how many
    types    in which keys ("k") and values ("v") are kept; state_type: likewise matrices
    lengths  rows of each sequence
    past     tokens that each sequence has read before, none without
    """

    op: Op
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, np.ndarray] = field(default_factory=dict)
    states: dict[str, np.ndarray] = field(default_factory=dict)
    caches: dict[str, list[np.ndarray]] = field(default_factory=dict)
    heads: int = 1
    first: int = 0
    types: Mapping[str, blocks.BlockFormat] = field(default_factory=lambda: KEPT)
    state_type: StateType = F32
    attributes: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (1,)
    past: tuple[int, ...] = ()
    outputs: np.ndarray | None = None
    ids: np.ndarray | None = None

    def build(self) -> tuple[Graph, Tensors]:
        """The graph of the op alone, behind the embedding that feeds it and before `select`."""
        graph, tensors = Graph(), Tensors()
        total = sum(self.lengths)
        bound: dict[str, Any] = {}
        if self.rows:
            gap = np.full((total, GAP), np.nan, np.float32)
            parts = [part for values in self.rows.values() for part in (gap, values)]
            table = np.concatenate([*parts, gap], axis=1)
            widths = [part.shape[1] for part in [*parts, gap]]
            wide = graph.embedding(tensors.add("rows", table), width=table.shape[1])
            bound.update(zip(self.rows, graph.split(wide, *widths)[1::2], strict=True))
        for slot, given in self.weights.items():
            values, block = given if isinstance(given, tuple) else (given, blocks.F32)
            bound[slot] = tensors.add(slot, values, block, self.raw.get(slot))
        for slot, values in self.states.items():
            bound[slot] = graph.state(slot, *values.shape[1:])
        for slot, held in self.caches.items():
            kind = "v" if slot == "values" else "k"
            bound[slot] = graph.cache(slot, kind, self.heads, held[0].shape[1] // self.heads)
        if self.first:
            bound["values"] = bound["keys"].first(self.first)
        slots = [slot for slot, operand in self.op.operands.items() if operand.kind not in GIVEN]
        out = graph.apply(self.op, *(bound.get(slot) for slot in slots), **self.attributes)
        # What only changes a state or the pages leaves nothing to look at.
        out = out if out.width else bound[next(iter(self.rows))]
        graph.finish(out if out.buffer.outputs else graph.select(out))
        return graph, tensors

    def machine(self, backend: str = "cpu", repack: bool = True) -> Machine:
        """A machine that plays the case."""
        return Machine(*self.build(), backend, repack, self.types, self.state_type)

    def begin(self, machine: Machine) -> list[State]:
        """The states that the case begins with, one a sequence."""
        sequences = [machine.fresh() for _ in self.lengths]
        for i, state in enumerate(sequences):
            state.position = self.past[i] if self.past else 0
            state.reserve(self.lengths[i])
            for page in state.pages:
                page.fill(255)
            for place in machine.layout.caches:
                view = CacheView(state, place.ref)
                view.position = 0
                view.write(self.caches[place.ref.name][i])
            for held in machine.layout.states:
                given = self.states[held.ref.name][i]
                state.raw(held)[:] = held.kind.encode(given, state.position)
        return sequences

    def play(self, machine: Machine, threads: int = 1, delay: int = 0) -> Played:
        """One forward over all sequences."""
        machine.backend.threads, machine.backend.delay_seed = threads, delay
        poison(machine.backend)
        sequences = self.begin(machine)
        ids = np.arange(sum(self.lengths)) if self.ids is None else self.ids
        parts = np.split(ids, np.cumsum(self.lengths)[:-1])
        rows = machine.forward(parts, sequences, self.outputs)
        cached = [
            CacheView(state, place.ref).read(state.position)
            for state in sequences
            for place in machine.layout.caches
        ]
        tensors = [state.tensors() for state in sequences]
        return Played(rows, [state.block for state in sequences], tensors, cached)


def ctrl_c_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, at: int) -> list[int]:
    """Let a method raise KeyboardInterrupt, as a signal does it, in place of its call number `at`.

    Returns a list that every call makes longer, by which it can be set to come again.
    """
    method, calls = getattr(owner, name), []

    def pressed(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return method(*arguments, **named)

    monkeypatch.setattr(owner, name, pressed)
    return calls


def error_ratio(got: np.ndarray, want: np.ndarray) -> float:
    """The largest L2 error of a row over the mean L2 norm of the wanted rows; NaN is infinite."""
    assert got.shape == want.shape, (got.shape, want.shape)
    if not np.isfinite(got).all():
        return float("inf")
    got, want = (part.reshape(len(part), -1).astype(np.float64) for part in (got, want))
    if not want.size:
        return 0.0
    norm = np.sqrt(np.square(want).sum(axis=1).mean())
    error = np.sqrt(np.square(got - want).sum(axis=1).max())
    return float(error / norm) if norm else float(error)
