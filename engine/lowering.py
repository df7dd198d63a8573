"""Lowering: a graph becomes an op table, an arena that buffers share, and barriers."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels import table
from ..kernels.formats.panels import LANES, PANELS
from ..kernels.op import Kind, Op, Operand, Weight
from ..models.graph import Buffer, CacheRef, Graph, Node, StateRef, Value
from .passes import quantize_activations
from .state import PAGE_ROWS, Layout
from .weights import Stored, WeightStore

_FLOAT = 4
_LINE = 64


@dataclass(frozen=True, slots=True)
class Span:
    """What an operand touches: bytes of a base, and columns where rows share them."""

    base: int
    start: int
    end: int
    buffer: Buffer | None = None
    columns: tuple[int, int] = (0, 0)

    def overlaps(self, other: Span) -> bool:
        """Whether the two may hold the same float."""
        if self.base != other.base or self.start >= other.end or other.start >= self.end:
            return False
        if self.buffer is not None and self.buffer is other.buffer:
            return self.columns[0] < other.columns[1] and other.columns[0] < self.columns[1]
        return True


@dataclass(frozen=True, slots=True)
class Program:
    """A lowered graph.

    records      (ops, table.RECORD) int64; kernel addresses are still 0, and no matrix is in panels
    kernels      (name, module) of each record's kernel
    weights      what the bases from table.WEIGHTS up point to
    arena_bytes  size of the memory that all buffers share
    scratch      bytes that every thread needs for itself
    partials     counters of a row, and bytes of a row for each span of tokens, that threads share
    vocabulary   width of the logits
    moves        by tensor, what its records hold once it is in panels
    """

    records: np.ndarray
    kernels: tuple[tuple[str, str], ...]
    weights: tuple[np.ndarray, ...]
    arena_bytes: int
    scratch: int
    partials: tuple[int, int]
    vocabulary: int
    moves: Mapping[str, Sequence[Move]]

    def move(self, tensor: str) -> None:
        """Let records find a tensor in panels, which now holds it."""
        for move in self.moves[tensor]:
            self.records[move.record, move.at] = move.fields
            self.records[move.record, table.PANELS] = 1


@dataclass(frozen=True, slots=True)
class Move:
    """New fields of a record's operand."""

    record: int
    at: slice
    fields: tuple[int, int, int, int]


def lower(graph: Graph, weights: WeightStore, layout: Layout, max_rows: int) -> Program:
    """Lower a graph for forwards of up to `max_rows` rows."""
    logits = graph.logits
    if logits is None or not logits.buffer.outputs or logits.width != logits.buffer.width:
        raise ValueError("a graph ends in one value, whole, for the rows that `select` kept")
    nodes = quantize_activations(graph, weights.block_of)
    return _Lowering(nodes, logits, weights, layout, max_rows).program()


class _Lowering:
    def __init__(
        self,
        nodes: Sequence[Node],
        logits: Value,
        weights: WeightStore,
        layout: Layout,
        max_rows: int,
    ) -> None:
        self.nodes, self.logits, self.store, self.max_rows = nodes, logits, weights, max_rows
        self.layout, self.partials = layout, (0, 0)
        self.places, self.arena_bytes = place_buffers(nodes, logits, max_rows)
        self.bases: dict[int, int] = {}
        self.scratch = 0
        self.weights: list[np.ndarray] = []
        self.moves: defaultdict[str, list[Move]] = defaultdict(list)

    def program(self) -> Program:
        records = np.zeros((len(self.nodes), table.RECORD), np.int64)
        many, one = _Barriers(), _Barriers()
        kernels = []
        for index, (node, record) in enumerate(zip(self.nodes, records, strict=True)):
            touched = self._fill(node, record, index)
            record[table.COUNTER] = index
            record[table.ALONE], record[table.MATRIX] = node.op.alone, _matrix_slot(node)
            record[table.WAIT] = many.before(touched)
            record[table.WAIT_ONE] = one.before(touched, node.op.alone)
            kernels.append((self._kernel(node), node.op.kernels))
            self.scratch = max(self.scratch, self._scratch(node))
        return Program(
            records,
            tuple(kernels),
            tuple(self.weights),
            self.arena_bytes,
            self.scratch,
            self.partials,
            self.logits.width,
            self.moves,
        )

    def _kernel(self, node: Node) -> str:
        operands = {slot: self._as_loaded(value) for slot, value in node.operands.items()}
        variant = node.op.variant(operands, node.attributes)
        return f"{node.op.name}.{variant}" if variant else node.op.name

    def _scratch(self, node: Node) -> int:
        """Bytes of a thread's own memory: what the op asks for, then room for a panel.

        Rows that are not in panels yet are packed when they are used.
        """
        operands = {
            slot: self.layout.held(value) if isinstance(value, StateRef) else value
            for slot, value in node.operands.items()
        }
        own = node.op.scratch(operands, node.attributes, self.max_rows)
        panels = [
            PANELS[block].stored.row_bytes(node.operands[slot].width) * LANES
            for slot, operand in node.op.operands.items()
            if operand.kind is Kind.MATRIX
            and (block := self.store.block_of(node.operands[slot])) in PANELS
        ]
        return _whole_lines(own) + _whole_lines(max(panels, default=0))

    def _as_loaded(self, value: Any) -> Any:
        """A weight with the type it has in memory; a state or cache with its place and type."""
        if isinstance(value, Weight):
            return Weight(value.name, value.shape, self.store.block_of(value))
        if isinstance(value, StateRef):
            return self.layout.held(value)
        return self.layout.place(value) if isinstance(value, CacheRef) else value

    def _fill(self, node: Node, record: np.ndarray, index: int) -> list[tuple[Span, bool]]:
        """Write a record; returns the spans it touches, each with whether it writes there."""
        record[table.ROWS] = table.OUTPUT_COUNT if node.out.buffer.outputs else table.TOKENS
        slots = [(Operand(Kind.ROWS), node.out)]
        slots += [(operand, node.operands[slot]) for slot, operand in node.op.operands.items()]
        assert len(slots) <= table.MAX_OPERANDS
        touched = []
        for slot, (operand, value) in enumerate(slots):
            start = table.OPERANDS + slot * table.OPERAND_FIELDS
            at = slice(start, start + table.OPERAND_FIELDS)
            record[at], span = self._operand(operand, value)
            if isinstance(value, Weight) and (panels := self.store.get(value, operand).panels):
                self.moves[value.name].append(Move(index, at, self._weight(panels)))
            if span is not None:
                touched.append((span, slot == 0 or operand.kind in (Kind.STATE, Kind.CACHE)))
        shared = node.op.partials(node.operands, node.attributes)
        if any(shared):
            self.partials = max(self.partials[0], shared[0]), max(self.partials[1], shared[1])
            touched.append((Span(table.SHARED, 0, 1), True))
        numbers = _attributes(node.op, node.attributes)
        record[table.ATTRIBUTES : table.ATTRIBUTES + len(numbers)] = numbers
        return touched

    def _operand(
        self, operand: Operand, value: Any
    ) -> tuple[tuple[int, int, int, int], Span | None]:
        """Base, offset, stride in bytes, width in floats; and the span that writes can meet."""
        if value is None or value is Kind.POSITIONS:  # kernels find positions in their context
            return (table.ABSENT, 0, 0, 0), None
        if value is Kind.IDS or value is Kind.OUTPUTS:
            return (table.IDS if value is Kind.IDS else table.OUTPUTS, 0, 0, 0), None
        if isinstance(value, Weight):
            return self._weight(self.store.get(value, operand)), None
        if isinstance(value, StateRef):
            held = self.layout.held(value)
            span = Span(table.STATE, held.offset, held.offset + held.nbytes)
            # In place of a width: all bits, or none, of what is added before rounding.
            return (table.STATE, held.offset, held.matrix_bytes, -held.kind.dithered), span
        if isinstance(value, CacheRef):
            place = self.layout.place(value)
            end = place.offset + value.heads * PAGE_ROWS * place.pitch
            span = Span(table.PAGES, place.offset, end)
            return (table.PAGES, place.offset, place.pitch, value.used), span
        return self._value(value)

    def _weight(self, stored: Stored) -> tuple[int, int, int, int]:
        base = self.bases.setdefault(id(stored), table.WEIGHTS + len(self.weights))
        if base == table.WEIGHTS + len(self.weights):
            self.weights.append(stored.data)
        return base, 0, stored.row_bytes, stored.width

    def _value(self, value: Value) -> tuple[tuple[int, int, int, int], Span | None]:
        step, start = value.buffer.width * _FLOAT, value.start * _FLOAT
        if value.buffer is self.logits.buffer:
            whole = Span(table.LOGITS, 0, self.max_rows * step)
            return (table.LOGITS, start, step, value.width), whole
        place = self.places[value.buffer]
        columns = (value.start, value.start + value.width)
        span = Span(table.ARENA, place, place + self.max_rows * step, value.buffer, columns)
        return (table.ARENA, place + start, step, value.width), span


def _whole_lines(nbytes: int) -> int:
    """Bytes up to the end of a cache line."""
    return -(-nbytes // _LINE) * _LINE


def _matrix_slot(node: Node) -> int:
    """The slot of the matrix that an op multiplies by, unless it is a stack; 0: there is none."""
    met = {operand.against for operand in node.op.operands.values()}
    for slot, name in enumerate(node.op.operands, 1):
        if name in met and len(node.operands[name].shape) == 2:
            return slot
    return 0


def _attributes(op: Op, attributes: dict[str, Any]) -> list[int]:
    """An op's numbers as int64: whole ones as such, others as the bits of a float64."""
    values = [(attributes[name], name in op.float_attributes) for name in op.attributes]
    assert len(values) <= table.MAX_ATTRIBUTES
    return [
        struct.unpack("<q", struct.pack("<d", value))[0] if fractional else int(value)
        for value, fractional in values
    ]


class _Barriers:
    """Finds the ops before which all threads have to wait for each other."""

    def __init__(self) -> None:
        #: What ops touch since the last barrier, whether they write, whether one thread runs them.
        self._pending: list[tuple[Span, bool, bool]] = []

    def before(self, touched: Sequence[tuple[Span, bool]], alone: bool = False) -> bool:
        """Whether the next op needs one; alone: the first thread runs it, after what it ran before.

        It does where two accesses meet at a place and one of them writes: RAW, WAW, WAR.
        """
        needed = any(
            (writes or wrote) and not (alone and was_alone) and span.overlaps(other)
            for span, writes in touched
            for other, wrote, was_alone in self._pending
        )
        if needed:
            self._pending = []
        self._pending += [(span, writes, alone) for span, writes in touched]
        return needed


def place_buffers(
    nodes: Sequence[Node], logits: Value, max_rows: int
) -> tuple[dict[Buffer, int], int]:
    """Offsets of buffers in the arena, shared by those that do not live at once; and its size.

    First fit, in the order of the ops. A buffer lives from the op that writes it to the last that
    reads it.
    """
    last: dict[Buffer, int] = {}
    for index, node in enumerate(nodes):
        for value in (node.out, *node.operands.values()):
            if isinstance(value, Value):
                last[value.buffer] = index
    places: dict[Buffer, int] = {}
    live: list[tuple[int, int, Buffer]] = []
    top = 0
    for index, node in enumerate(nodes):
        buffer = node.out.buffer
        if buffer is logits.buffer:
            continue
        live = [(start, end, other) for start, end, other in live if last[other] >= index]
        size = _whole_lines(max_rows * buffer.width * _FLOAT)
        start = _first_gap(sorted((start, end) for start, end, _ in live), size)
        places[buffer] = start
        live.append((start, start + size, buffer))
        top = max(top, start + size)
    return places, top


def _first_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    at = 0
    for start, end in taken:
        if start - at >= size:
            break
        at = max(at, end)
    return at
