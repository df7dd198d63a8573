"""What an op is: its operands, its attributes, its shape rule and its NumPy definition.

A graph names ops and never computes; the `numpy` backend plays the definitions, every other backend
lowers them to kernels. All activations are float32 rows: arrays of shape (rows, width).
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any

import numpy as np

from .errors import KeelbackError
from .formats.blocks import BlockFormat

#: No dimension of a model is larger; what exceeds it is a damaged or hostile file.
LARGEST_DIMENSION = 1 << 24


class Kind(Enum):
    """What an operand slot holds."""

    ROWS = "rows"  # activations, (rows, width) float32
    MATRIX = "matrix"  # a weight in any native type
    VECTOR = "vector"  # a weight, always float32 when a kernel sees it
    STATE = "state"  # a tensor of each sequence's state block
    CACHE = "cache"  # what each sequence's KV pages keep for one layer, in one of their types
    IDS = "ids"  # the token ids of this forward, (T,) int64
    OUTPUTS = "outputs"  # indices of the rows whose logits were asked for, (R,) int64
    POSITIONS = "positions"  # how many tokens of its sequence come before each row, (T,) int64


#: What comes with every forward, and is not named when an op is added to a graph.
GIVEN = frozenset({Kind.IDS, Kind.OUTPUTS, Kind.POSITIONS})


@dataclass(frozen=True, slots=True)
class Operand:
    """A slot of an op.

    pack     rearranges a weight once, when the model is loaded
    against  of rows: the slot of the matrix they are multiplied with. Where its type wants rounded
             activations, the kernel is given what `quantize` makes of the rows
    parts    of such rows: the attribute that says how many parts of them are rounded by themselves
    typed    of a state: may be kept in other types than float32. The definition is given an object
             with its float32 `values`, and calls `keep(t)` when they are those behind row t
    """

    kind: Kind
    optional: bool = False
    pack: Callable[[np.ndarray], np.ndarray] | None = None
    against: str | None = None
    parts: str | None = None
    typed: bool = False


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the model file: `shape` slowest dimension first."""

    name: str
    shape: tuple[int, ...]
    block: BlockFormat

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.shape[-1]

    @property
    def size(self) -> int:
        """Elements in all."""
        return math.prod(self.shape)


class ShapeError(KeelbackError):
    """A tensor does not have the shape that the model's hyperparameters ask for."""


def expect(weight: Weight | None, *shape: int) -> None:
    """Raise ShapeError unless a weight has `shape`; dimensions of one do not count.

    Except that rows are rows: kernels step through a matrix by its last dimension.
    """
    if weight is None:
        return
    squeezed = [n for n in weight.shape if n != 1]
    misaligned = len(shape) > 1 and weight.width != shape[-1]
    if squeezed != [n for n in shape if n != 1] or misaligned:
        raise ShapeError(
            f"tensor {weight.name} has the shape {list(weight.shape)} where {list(shape)} is "
            "needed; the file is damaged or of another version of the architecture"
        )


def expect_state(state: Any, *shape: int) -> None:
    """Raise ShapeError unless a model has reserved a state of `shape`."""
    if state.shape != shape:
        raise ShapeError(f"the state {state.name} has the shape {state.shape}, not {shape}")


@dataclass(frozen=True, slots=True)
class Op:
    """An op of the catalogue.

    operands    slots in the order in which the definition takes them
    attributes  names of the numbers a kernel is given, in order
    shape       (operands..., **attributes) -> width of the output row; raises ShapeError
    define      (arrays..., **attributes) -> output rows; for an op with STATE or CACHE operands it
                is called once per sequence, and changes those in place
    variant     (operands by name, attributes) -> which of the op's kernels to compile
    scratch     (operands by name, attributes, most rows of a forward) -> bytes that a kernel needs
                of its thread's own memory, from its first byte on
    partials    (operands by name, attributes) -> counters of a row, and bytes of a row for each
                span of tokens that it reads: what threads share where they take spans of a row
    """

    name: str
    operands: Mapping[str, Operand]
    shape: Callable[..., int]
    define: Callable[..., np.ndarray]
    attributes: tuple[str, ...] = ()
    variant: Callable[[Mapping[str, Any], Mapping[str, Any]], str] = field(default=lambda *_: "")
    scratch: Callable[[Mapping[str, Any], Mapping[str, Any], int], int] = field(
        default=lambda *_: 0
    )
    partials: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[int, int]] = field(
        default=lambda *_: (0, 0)
    )

    @property
    def defaults(self) -> dict[str, Any]:
        """Attributes that the definition does not insist on."""
        return _defaults(self.define)

    @property
    def kernels(self) -> str:
        """The module with the op's compiled kernels: the sibling of the one that defines it."""
        return f"{self.define.__module__}_cpu"

    @property
    def float_attributes(self) -> set[str]:
        """Attributes that the definition annotates as float."""
        return _floats(self.define) & set(self.attributes)

    @property
    def alone(self) -> bool:
        """Whether one row is so little work that one thread had better do it alone."""
        large = (Kind.MATRIX, Kind.STATE, Kind.CACHE)
        return not any(operand.kind in large for operand in self.operands.values())

    @property
    def stateful(self) -> bool:
        """Whether the op walks each sequence's rows in order."""
        return any(operand.kind in (Kind.STATE, Kind.CACHE) for operand in self.operands.values())


@cache
def _defaults(define: Callable[..., np.ndarray]) -> dict[str, Any]:
    parameters = inspect.signature(define).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.default is not p.empty
    }


@cache
def _floats(define: Callable[..., np.ndarray]) -> set[str]:
    parameters = inspect.signature(define).parameters
    return {name for name, p in parameters.items() if p.annotation == "float"}


ROWS, OPTIONAL_ROWS = Operand(Kind.ROWS), Operand(Kind.ROWS, optional=True)
MATRIX = Operand(Kind.MATRIX)
VECTOR, OPTIONAL_VECTOR = Operand(Kind.VECTOR), Operand(Kind.VECTOR, optional=True)
STATE, CACHE = Operand(Kind.STATE), Operand(Kind.CACHE)
TYPED_STATE = Operand(Kind.STATE, typed=True)
IDS, OUTPUTS, POSITIONS = Operand(Kind.IDS), Operand(Kind.OUTPUTS), Operand(Kind.POSITIONS)

#: The modules that hold ops; each has a `_cpu` sibling.
FAMILIES = (
    "activation", "attention", "columns", "conv", "embedding", "experts", "importance", "linear",
    "norm", "recurrence", "rotary", "scan",
)  # fmt: skip


@cache
def catalogue() -> dict[str, Op]:
    """Every op by name."""
    modules = [importlib.import_module(f".{family}", __package__) for family in FAMILIES]
    return {op.name: op for module in modules for op in module.OPS}


def transposed(weight: np.ndarray) -> np.ndarray:
    """Pack a weight of two dimensions column by column, so that its rows lie in lanes."""
    matrix = weight.reshape(-1, weight.shape[-1])
    return np.ascontiguousarray(matrix.T)
