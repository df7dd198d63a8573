"""The bytes of a tensor in its GGUF type, a few megabytes at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ..kernels.errors import InvalidFile
from ..kernels.formats import blocks
from ..kernels.formats.blocks import F16, F32, BlockFormat
from .plan import Tensor

#: Bytes of float32 that are encoded at once.
CHUNK_BYTES = 8 << 20

#: The largest value a type can hold, where that is less than float32's.
_LIMITS = {"F16": 65504.0, "BF16": 3.38e38, "Q8_0": 65504.0 * 127}

#: Bits that are all set in what is no finite number.
_EXPONENTS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}

_T = TypeVar("_T")


def type_of(tensor: Tensor, outtype: BlockFormat) -> BlockFormat:
    """The type a tensor gets: F32 where it has to be, F16 where rows do not divide into blocks."""
    if tensor.always_f32:
        return F32
    return F16 if tensor.shape[-1] % outtype.elements else outtype


def size_of(tensor: Tensor, kind: BlockFormat) -> int:
    """Bytes of a tensor in a type."""
    return math.prod(tensor.shape[:-1]) * kind.row_bytes(tensor.shape[-1])


def encoded(tensor: Tensor, kind: BlockFormat) -> Iterator[np.ndarray]:
    """The bytes of a tensor, piece by piece: uint8.

    Raises InvalidFile for values that are not finite or too large for the type.
    """
    if not tensor.parts:
        yield np.zeros(size_of(tensor, kind), np.uint8)
    for part in tensor.parts:
        step = max(1, CHUNK_BYTES // (4 * part.width))
        for first in range(0, part.count, step):
            if part.is_stored_as(kind.name):
                values = part.read_raw(first, step)
                _check_bits(tensor, kind, values)
                yield values.reshape(-1).view(np.uint8)
            else:
                values = part.read(first, step)
                _check(tensor, kind, values)
                yield blocks.quantize(values, kind).reshape(-1)


def ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The same items; each is made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as pool:
        end = object()
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def _check_bits(tensor: Tensor, kind: BlockFormat, values: np.ndarray) -> None:
    """`_check` for numbers that are written as they are read."""
    bits = values.view(f"u{kind.nbytes}")
    exponent = bits.dtype.type(_EXPONENTS[kind.name])
    if ((bits & exponent) == exponent).any():
        raise _not_finite(tensor)


def _check(tensor: Tensor, kind: BlockFormat, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise _not_finite(tensor)
    if kind.name in _LIMITS and np.abs(values).max() > _LIMITS[kind.name]:
        raise InvalidFile(
            f"a value of {tensor.name} is too large for {kind.name}; convert with --outtype f32"
        )


def _not_finite(tensor: Tensor) -> InvalidFile:
    return InvalidFile(
        f"the values of {tensor.name} are not finite; the checkpoint is damaged, or its training "
        "failed"
    )
