"""The graph builder: a model is a list of ops over named buffers, and building it computes nothing.

`g.rms_norm(x, w.attn_norm, eps=...)` adds the op of that name from the catalogue and returns the
value it will produce. Weights are named as in the GGUF file: `w.blk[3].ssm_in`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidFile, UnsupportedModel
from ..kernels.formats.blocks import readable
from ..kernels.formats.gguf import TensorInfo
from ..kernels.op import GIVEN, Kind, Op, Weight, catalogue


@dataclass(eq=False, slots=True)
class Buffer:
    """Rows of `width` float32 that one op writes: all tokens, or the `outputs` asked for."""

    width: int
    outputs: bool = False


@dataclass(frozen=True, slots=True)
class Value:
    """Columns `start` to `start + width` of a buffer."""

    buffer: Buffer
    start: int
    width: int


@dataclass(frozen=True, slots=True)
class StateRef:
    """A tensor of every sequence's state, of `shape`."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements in all."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class CacheRef:
    """What every token leaves in the KV pages: `d_head` values for each of `heads` heads.

    kind: "k" or "v", which may be kept in different types. used: of each head's values, how many
    of the first are read.
    """

    name: str
    kind: str
    heads: int
    d_head: int
    used: int

    @property
    def width(self) -> int:
        """Values of a token that are read."""
        return self.heads * self.used

    def first(self, used: int) -> CacheRef:
        """The first values of each head alone, as an operand."""
        return replace(self, used=used)


@dataclass(frozen=True, slots=True)
class Node:
    """One op with its operands by slot name (None where an optional one is absent)."""

    op: Op
    operands: dict[str, Any]
    attributes: dict[str, Any]
    out: Value


@dataclass(slots=True)
class Graph:
    """Ops in the order in which they run, and what a sequence has to remember between forwards."""

    nodes: list[Node] = field(default_factory=list)
    states: list[StateRef] = field(default_factory=list)
    caches: list[CacheRef] = field(default_factory=list)
    logits: Value | None = None

    def __getattr__(self, name: str) -> Callable[..., Value]:
        op = catalogue().get(name)
        if op is None:
            raise AttributeError(name)
        return lambda *operands, **attributes: self.apply(op, *operands, **attributes)

    def apply(self, op: Op, *operands: Any, **attributes: Any) -> Value:
        """Add an op and return the value it produces.

        A namespace stands for its tensor, and fills the op's `bias` slot with the `.bias` beside
        it where the file has one. Raises ShapeError where shapes do not fit, InvalidFile for a
        missing tensor, UnsupportedModel for one of a type that cannot be decoded.
        """
        given = iter(operands)
        bound: dict[str, Any] = {}
        for slot, operand in op.operands.items():
            if operand.kind in GIVEN:
                bound[slot] = operand.kind
                continue
            value = next(given, None)
            if isinstance(value, Namespace) and "bias" in op.operands and slot != "bias":
                value, bound["bias"] = value.tensor_and_bias()
            elif isinstance(value, Namespace):
                value = value.tensor()
            if value is not None or not operand.optional:
                bound[slot] = value
            else:
                bound.setdefault(slot, None)
        attributes = {**op.defaults, **attributes}
        width = op.shape(*(bound[slot] for slot in op.operands), **attributes)
        inputs = [value for value in bound.values() if isinstance(value, Value)]
        outputs = Kind.OUTPUTS in bound.values() or (bool(inputs) and inputs[0].buffer.outputs)
        out = Value(Buffer(width, outputs), 0, width)
        self.nodes.append(Node(op, {slot: bound[slot] for slot in op.operands}, attributes, out))
        return out

    def split(self, value: Value, *widths: int) -> list[Value]:
        """Cut a value into columns; nothing is copied. ValueError where widths do not add up."""
        starts = [value.start + sum(widths[:i]) for i in range(len(widths))]
        if sum(widths) != value.width:
            raise ValueError(f"{widths} do not add up to {value.width}")
        return [
            Value(value.buffer, start, width) for start, width in zip(starts, widths, strict=True)
        ]

    def state(self, name: str, *shape: int) -> StateRef:
        """Reserve a tensor in the state block."""
        self.states.append(StateRef(name, shape))
        return self.states[-1]

    def cache(self, name: str, kind: str, heads: int, d_head: int) -> CacheRef:
        """Reserve room in the KV pages for values that every token leaves."""
        self.caches.append(CacheRef(name, kind, heads, d_head, d_head))
        return self.caches[-1]

    @property
    def typed_states(self) -> set[StateRef]:
        """Tensors of the state that all their ops take in any type."""
        slots = [
            (value, operand.typed)
            for node in self.nodes
            for value, operand in zip(
                node.operands.values(), node.op.operands.values(), strict=True
            )
            if isinstance(value, StateRef)
        ]
        return {ref for ref, _ in slots} - {ref for ref, typed in slots if not typed}

    def finish(self, logits: Value) -> None:
        """Name the value that leaves the graph."""
        self.logits = logits


class Namespace:
    """Tensors of a file by the parts of their names: `w.blk[3].ssm_in` stands for the tensor
    `blk.3.ssm_in.weight`, or for `blk.3.ssm_in` where that has no suffix.

    Every attribute is a namespace below; what is not there is reported when an op asks for it.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        path: Path,
        prefix: str = "",
        used: set[str] | None = None,
    ) -> None:
        self._tensors, self._path, self._prefix = tensors, path, prefix
        self._used: set[str] = set() if used is None else used

    def __getattr__(self, name: str) -> Namespace:
        return Namespace(self._tensors, self._path, f"{self._prefix}{name}.", self._used)

    def __getitem__(self, index: int) -> Namespace:
        return getattr(self, str(index))

    def find(self) -> Weight | None:
        """The tensor this namespace stands for, or None where the file has none."""
        bare = self._prefix.rstrip(".")
        return self._get(f"{self._prefix}weight") or self._get(bare)

    def tensor(self) -> Weight:
        """`find` for a tensor that has to be there; raises InvalidFile when it is not."""
        weight = self.find()
        if weight is None:
            name = self._prefix.rstrip(".")
            raise InvalidFile(
                f"{self._path} lacks the tensor {name}; convert or download the model again"
            )
        return weight

    def tensor_and_bias(self) -> tuple[Weight, Weight | None]:
        """The tensor, and where the file has one the `.bias` beside it."""
        return self.tensor(), self._get(f"{self._prefix}bias")

    def ignore(self, first: int) -> None:
        """Leave aside what lies under the number `first` and higher ones; a model says why."""
        for name in self._tensors:
            if name.startswith(self._prefix):
                number = name.removeprefix(self._prefix).partition(".")[0]
                if number.isdecimal() and int(number) >= first:
                    self._used.add(name)

    def unused(self) -> list[str]:
        """Tensors that nothing has asked for."""
        return sorted(set(self._tensors) - self._used)

    def _get(self, name: str) -> Weight | None:
        info = self._tensors.get(name)
        if info is None:
            return None
        if not readable(info.block):
            raise UnsupportedModel(
                f"{self._path}: tensor {name} has the type {info.block.name}, which cannot be "
                "decoded; convert the model to F16 or Q8_0"
            )
        self._used.add(name)
        return Weight(name, info.shape, info.block)
