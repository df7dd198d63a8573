"""What a conversion is made of: metadata, and tensors that are written one after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .source import Source, Stored, rows_of


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a GGUF tensor that come from one tensor of the checkpoint.

    rows, columns  orders in which those of the source (seen as a matrix) are taken
    function       applied element by element, in float32
    """

    source: Source
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    function: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def count(self) -> int:
        """How many rows there are."""
        return rows_of(self.source) if self.rows is None else len(self.rows)

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        return math.prod(self.source.shape) // rows_of(self.source)

    def read(self, first: int, count: int) -> np.ndarray:
        """`count` rows from `first` on, as float32: (count, width)."""
        values = self.source.read(self._wanted(first, count))
        if self.columns is not None:
            values = values[:, self.columns]
        return values if self.function is None else self.function(values)

    def is_stored_as(self, kind: str) -> bool:
        """Whether the bytes of the checkpoint are those of a type, row for row."""
        plain = self.columns is None and self.function is None and isinstance(self.source, Stored)
        return plain and self.source.kind == kind

    def read_raw(self, first: int, count: int) -> np.ndarray:
        """`read` for a part that `is_stored_as` a type: in that type, bfloat16 as its bits."""
        assert isinstance(self.source, Stored)
        return self.source.read_raw(self._wanted(first, count))

    def _wanted(self, first: int, count: int) -> slice | np.ndarray:
        wanted = slice(first, first + count)
        return wanted if self.rows is None else self.rows[wanted]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the GGUF file: `shape` slowest dimension first; without parts it is all zero."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(slots=True)
class Plan:
    """An architecture's answer to a checkpoint: `keys` without their architecture's prefix.

    remarks  sentences about what only keelback can run, and what is left out
    """

    architecture: str
    keys: dict[str, Any]
    tensors: list[Tensor] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, name: str, shape: tuple[int, ...], *parts: Source | Part) -> None:
        """Add a tensor; a source stands for all its rows as they are."""
        wrapped = (part if isinstance(part, Part) else Part(part) for part in parts)
        self.tensors.append(Tensor(name, shape, tuple(wrapped)))

    def remark(self, text: str) -> None:
        """Say once what llama.cpp cannot do with the file, or no program does."""
        if text not in self.remarks:
            self.remarks.append(text)


def negative_exp(a_log: np.ndarray) -> np.ndarray:
    """A = -exp(A_log): GGUF holds the decay rate itself."""
    with np.errstate(over="ignore"):
        return -np.exp(a_log)
