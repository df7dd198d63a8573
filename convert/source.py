"""Tensors on disk, read a few rows at a time.

Files are read and not mapped: a source that is unplugged or cut off while it is read becomes a
sentence, where a map would end the process, and memory holds no more than the rows asked for.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np

from ..kernels.errors import InvalidFile, UnsupportedModel
from ..kernels.formats.blocks import bf16_to_f32

#: Bytes of a number of every type, by the names of safetensors.
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "U64": 8,
    "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def _widened(raw: np.ndarray) -> np.ndarray:
    # What is too large for float32 becomes infinite, and is refused where it is encoded.
    with np.errstate(over="ignore"):
        return raw.astype(np.float32, copy=False)


def _e4m3_values() -> np.ndarray:
    """All float8 numbers of 4 bits of exponent: (256,) float32; this type has no infinities."""
    exponent, fraction = np.arange(128) >> 3, np.arange(128) & 7
    small, normal = fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10)
    values = np.where(exponent == 0, small, normal)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_E4M3 = _e4m3_values()

#: The types that can be read: how NumPy sees their bytes, and the way to float32.
TYPES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "F32": ("<f4", _widened),
    "F16": ("<f2", _widened),
    "BF16": ("<u2", bf16_to_f32),
    "F64": ("<f8", _widened),
    "F8_E4M3": ("u1", lambda raw: _E4M3[raw]),
    "F8_E5M2": ("u1", lambda raw: _widened((raw.astype("<u2") << 8).view("<f2"))),
}
#: Those of them that factors may belong to.
FLOAT8 = ("F8_E4M3", "F8_E5M2")
_COMPARED_ROWS = 256


class InputFile:
    """A file of a checkpoint: `size` bytes, read at any offset and by any thread.

    Raises InvalidFile where it cannot be opened or read, or ends before it should.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        if os.path.exists(path) and not os.path.isfile(path):
            raise InvalidFile(f"{path} is no ordinary file; download the checkpoint again")
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            self.size = self._file.seek(0, 2)
        except FileNotFoundError:
            raise InvalidFile(f"{path} is missing; download the checkpoint again") from None
        except OSError as error:
            raise InvalidFile(f"{path} cannot be opened: {error.strerror}") from None

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on."""
        data = np.empty(count, np.uint8)
        self.read_into(offset, data)
        return data.tobytes()

    def read_into(self, offset: int, target: np.ndarray) -> None:
        """Fill a contiguous array with the bytes from `offset` on."""
        view = target.reshape(-1).view(np.uint8).data
        try:
            with self._lock:
                self._file.seek(offset)
                while view:
                    count = self._file.readinto(view)
                    if not count:
                        raise InvalidFile(f"{self.path} ends too early; download it again")
                    view = view[count:]
        except OSError as error:
            raise InvalidFile(
                f"{self.path} cannot be read ({error.strerror}); check the disk it lies on"
            ) from None


class Source(Protocol):
    """A tensor of a checkpoint: `kind` as safetensors names it, `shape` slowest dimension first."""

    @property
    def kind(self) -> str:
        """The type of its numbers on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""

    def read(self, rows: slice | np.ndarray = ...) -> np.ndarray:
        """The rows of a slice or of an index, as float32: (count, width)."""

    def reshaped(self, *shape: int) -> Source:
        """The same numbers in another shape of the same size."""


def rows_of(source: Source) -> int:
    """Rows of a tensor seen as a matrix; one of a single dimension is one row."""
    return source.shape[0] if len(source.shape) > 1 else 1


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor whose numbers lie one behind the other in a file, from `offset` on."""

    file: InputFile
    kind: str
    shape: tuple[int, ...]
    offset: int

    def read(self, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The rows of a slice or of an index, as float32: (count, width)."""
        return TYPES[self.kind][1](self.read_raw(rows))

    def read_raw(self, rows: slice | np.ndarray) -> np.ndarray:
        """`read` in the type of the file; bfloat16 comes as its bits, uint16."""
        dtype, count = np.dtype(TYPES[self.kind][0]), rows_of(self)
        width = math.prod(self.shape) // count
        if isinstance(rows, slice):
            first, last, _ = rows.indices(count)
            runs = [(first, max(0, last - first))]
        else:
            runs = _runs(rows)
        values = np.empty((sum(length for _, length in runs), width), dtype)
        done = 0
        for first, length in runs:
            offset = self.offset + first * width * dtype.itemsize
            self.file.read_into(offset, values[done : done + length])
            done += length
        return values

    def reshaped(self, *shape: int) -> Stored:
        """The same numbers in another shape of the same size."""
        return Stored(self.file, self.kind, shape, self.offset)


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """The stretches of neighbours in an index: (first, length)."""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    lengths = np.diff(starts, append=len(rows))
    return list(zip(rows[starts].tolist(), lengths.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Scaled:
    """A float8 matrix: every block of it has a factor of its own.

    factors: (row blocks, column blocks) float32, of blocks of `block` (rows, columns).
    """

    numbers: Source
    factors: np.ndarray
    block: tuple[int, int]

    @property
    def kind(self) -> str:
        """The type that holds what factors and numbers make."""
        return "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions of the matrix."""
        return self.numbers.shape

    def read(self, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The rows of a slice or of an index, as float32: (count, width)."""
        values = self.numbers.read(rows)
        index = np.arange(self.shape[0])[rows]
        factors = self.factors[index // self.block[0]].repeat(self.block[1], axis=1)
        return values * factors[:, : values.shape[1]]

    def reshaped(self, *shape: int) -> Scaled:
        """The same matrix; another one is refused, for blocks are those of this shape."""
        if tuple(n for n in shape if n != 1) != tuple(n for n in self.shape if n != 1):
            raise UnsupportedModel(
                f"a float8 matrix of shape {list(self.shape)} cannot be read as {list(shape)}; "
                "convert the checkpoint in BF16"
            )
        return self


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix cut into `count` equal stacks of rows, of each the first `width` rows transposed.

    So each stack has a row of `width` numbers for every column of the matrix.
    """

    source: Source
    count: int
    width: int

    @property
    def kind(self) -> str:
        """The type of its numbers on disk."""
        return self.source.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return self.count * self.source.shape[1], self.width

    def read(self, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The rows of a slice or of an index, as float32: (count, width)."""
        height, columns = self.source.shape[0] // self.count, self.source.shape[1]
        stacks, lines = np.divmod(np.arange(self.shape[0])[rows], columns)
        values = np.empty((len(stacks), self.width), np.float32)
        for stack in np.unique(stacks):
            first = int(stack) * height
            block = self.source.read(slice(first, first + self.width))
            values[stacks == stack] = block.T[lines[stacks == stack]]
        return values

    def reshaped(self, *shape: int) -> Transposed:
        """Itself: nobody asks for another shape."""
        assert math.prod(shape) == math.prod(self.shape)
        return self


def equal(one: Source, other: Source) -> bool:
    """Whether two tensors hold the same numbers; compared a few rows at a time."""
    starts = range(0, rows_of(one), _COMPARED_ROWS)
    return one.shape == other.shape and all(
        np.array_equal(
            one.read(slice(at, at + _COMPARED_ROWS)), other.read(slice(at, at + _COMPARED_ROWS))
        )
        for at in starts
    )
