"""The bytes of a tensor in its GGUF type, a few megabytes at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from ..kernels.errors import InvalidFile
from ..kernels.formats.blocks import BlockFormat
from ..kernels.formats.finite import not_finite
from .ahead import Task
from .encoders import LIMITS, encode
from .plan import Part, Tensor

#: Bytes of float32 that are encoded at once: few enough to stay in a processor's cache.
CHUNK_BYTES = 1 << 20


def size_of(shape: tuple[int, ...], kind: BlockFormat) -> int:
    """Bytes of a tensor in a type."""
    return math.prod(shape[:-1]) * kind.row_bytes(shape[-1])


def spans(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows of so many numbers in portions that are encoded at once: the first, and how many."""
    step = max(1, CHUNK_BYTES // (4 * width))
    return ((first, min(step, rows - first)) for first in range(0, rows, step))


def tasks(
    tensor: Tensor, kind: BlockFormat, importance: np.ndarray | None = None
) -> Iterator[Task]:
    """What makes the bytes of a checkpoint's tensor, piece by piece.

    importance: float32 (matrices, width), or None. The tasks raise InvalidFile for values that are
    not finite or too large for the type.
    """
    if not tensor.parts:
        yield partial(bytes, size_of(tensor.shape, kind))
    before = 0
    for part in tensor.parts:
        make = _copied if part.is_stored_as(kind.name) else partial(_read, importance, before)
        for first, count in spans(part.count, part.width):
            yield partial(make, tensor, kind, part, first, count)
        before += part.count * part.width


def encoded(
    name: str,
    values: np.ndarray,
    kind: BlockFormat,
    importance: np.ndarray | None,
    first: int,
    rows: int,
) -> memoryview:
    """Rows of a tensor in a type.

    values: float32 (count, width), rows from `first` on. importance: float32 (matrices, width) for
    the columns of a stack of matrices of `rows` rows each, or None. Raises InvalidFile, which names
    the tensor, for values that are not finite or too large for the type.
    """
    largest = max(-float(values.min()), float(values.max()))
    if not math.isfinite(largest):  # so it is also beside a NaN
        raise _not_finite(name)
    if largest > LIMITS.get(kind, largest):
        raise InvalidFile(f"a value of {name} is too large for {kind.name}; choose the type F32")
    if importance is None:
        result = encode(values, kind)
    else:
        matrices = _matrices(first, len(values), rows)
        result = np.concatenate(
            [encode(values[begin:end], kind, importance[i]) for i, begin, end in matrices]
        )
    return np.ascontiguousarray(result).reshape(-1).data


def _matrices(first: int, count: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """Which matrices of a stack some rows are of: the matrix, and the span of these rows in it."""
    for matrix in range(first // rows, (first + count - 1) // rows + 1):
        yield matrix, max(0, matrix * rows - first), min(count, (matrix + 1) * rows - first)


def _copied(tensor: Tensor, kind: BlockFormat, part: Part, first: int, count: int) -> memoryview:
    """Rows that are in the file as they will be written."""
    data = np.ascontiguousarray(part.read_raw(first, count)).reshape(-1).view(np.uint8).data
    if any(not_finite(data, kind)):
        raise _not_finite(tensor.name)
    return data


def _read(
    importance: np.ndarray | None,
    before: int,
    tensor: Tensor,
    kind: BlockFormat,
    part: Part,
    first: int,
    count: int,
) -> memoryview:
    """Rows that change their type; `before` numbers of the tensor come from other parts."""
    # Blocks are made of the tensor's rows, which the source may have cut otherwise. What becomes no
    # blocks may be a piece of a row.
    values, width = np.ascontiguousarray(part.read(first, count), np.float32), tensor.shape[-1]
    values = values.reshape((-1, width) if kind.elements > 1 else (1, -1))
    begin, rows = (before + first * part.width) // width, math.prod(tensor.shape[-2:-1])
    return encoded(tensor.name, values, kind, importance, begin, rows)


def _not_finite(name: str) -> InvalidFile:
    return InvalidFile(
        f"the values of {name} are not finite; the file is damaged, or the training failed"
    )
