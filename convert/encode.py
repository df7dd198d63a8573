"""The bytes of a tensor in its GGUF type, a few megabytes at a time."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np

from ..kernels.errors import InvalidFile
from ..kernels.formats import blocks
from ..kernels.formats.blocks import F16, F32, BlockFormat
from .plan import Part, Tensor

#: Bytes of float32 that are encoded at once: few enough to stay in a processor's cache.
CHUNK_BYTES = 1 << 20

#: The largest value a type can hold, where that is less than float32's.
_LIMITS = {"F16": 65504.0, "BF16": 3.38e38, "Q8_0": 65504.0 * 127}

#: Bits that are all set in what is no finite number.
_EXPONENTS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}

#: More of them wait for the disk.
_THREADS = min(4, os.cpu_count() or 1)


def type_of(tensor: Tensor, outtype: BlockFormat) -> BlockFormat:
    """The type a tensor gets: F32 where it has to be, F16 where rows do not divide into blocks."""
    if tensor.always_f32:
        return F32
    return F16 if tensor.shape[-1] % outtype.elements else outtype


def size_of(tensor: Tensor, kind: BlockFormat) -> int:
    """Bytes of a tensor in a type."""
    return math.prod(tensor.shape[:-1]) * kind.row_bytes(tensor.shape[-1])


def pieces(tensor: Tensor, kind: BlockFormat) -> Iterator[memoryview]:
    """The bytes of a tensor, piece by piece.

    Pieces are made in threads, some ahead of the one that is used. Raises InvalidFile for values
    that are not finite or too large for the type.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        made: deque[Future[np.ndarray]] = deque()
        for task in _tasks(tensor, kind):
            made.append(pool.submit(task))
            if len(made) > _THREADS:
                yield made.popleft().result().data
        while made:
            yield made.popleft().result().data


def _tasks(tensor: Tensor, kind: BlockFormat) -> Iterator[Callable[[], np.ndarray]]:
    if not tensor.parts:
        yield partial(np.zeros, size_of(tensor, kind), np.uint8)
    for part in tensor.parts:
        step = max(1, CHUNK_BYTES // (4 * part.width))
        encode = _copied if part.is_stored_as(kind.name) else _encoded
        for first in range(0, part.count, step):
            yield partial(encode, tensor, kind, part, first, step)


def _copied(tensor: Tensor, kind: BlockFormat, part: Part, first: int, count: int) -> np.ndarray:
    """Rows that are in the file as they will be written."""
    values = part.read_raw(first, count)
    bits = values.view(f"u{kind.nbytes}")
    exponent = bits.dtype.type(_EXPONENTS[kind.name])
    if ((bits & exponent) == exponent).any():
        raise _not_finite(tensor)
    return values.reshape(-1).view(np.uint8)


def _encoded(tensor: Tensor, kind: BlockFormat, part: Part, first: int, count: int) -> np.ndarray:
    values = part.read(first, count)
    if not np.isfinite(values).all():
        raise _not_finite(tensor)
    if kind.name in _LIMITS and np.abs(values).max() > _LIMITS[kind.name]:
        raise InvalidFile(
            f"a value of {tensor.name} is too large for {kind.name}; convert with --outtype f32"
        )
    return blocks.quantize(values, kind).reshape(-1)


def _not_finite(tensor: Tensor) -> InvalidFile:
    return InvalidFile(
        f"the values of {tensor.name} are not finite; the checkpoint is damaged, or its training "
        "failed"
    )
