"""In what types the matrix states of a recurrence may be kept; it is computed in float32 in all.

A state is rounded after every token, also where many are read at once, so that it depends on the
tokens alone and not on how they arrived. Definitions are given float32 values and an object that
rounds them; kernels load and store the bytes that `encode` describes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .dither import HALF, fractions

#: Of INT8: the whole numbers to the largest value, a little less than 127 so that no fraction takes
#: it further; what one of them is of the largest; and the least such value that is told from 0.
LEVELS, LEVEL, LEAST = np.float32(126.99), np.float32(1 / 126.99), np.float32(1e-30)


@dataclass(frozen=True, slots=True)
class StateType:
    """How a matrix (K, V) of a state is kept.

    matrix_bytes  of K and V
    encode    (..., K, V) float32, as they are behind the token of a position ->
              (..., bytes of a matrix) uint8
    decode    those bytes and (K, V) -> (..., K, V) float32
    kernel    the name of the kernels that take it
    dithered  whether what is rounded is dithered, or rounded to the nearest
    scaled    whether each column has a scale of its own
    """

    name: str
    matrix_bytes: Callable[[int, int], int]
    encode: Callable[[np.ndarray, int], np.ndarray]
    decode: Callable[[np.ndarray, int, int], np.ndarray]
    kernel: str
    dithered: bool = False
    scaled: bool = False

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a whole tensor of matrices."""
        return math.prod(shape[:-2]) * self.matrix_bytes(shape[-2], shape[-1])


def ending(kernel: str) -> str:
    """How the name of a kernel ends that takes a type; nothing for float32."""
    return "" if kernel == F32.kernel else f"_{kernel}"


def variant_of(place: Any) -> str:
    """`ending` for a state at its place."""
    return ending(place.kind.kernel)


def bytes_of(values: np.ndarray, matrices: tuple[int, ...]) -> np.ndarray:
    """The memory of an array, a row of bytes for each of its matrices."""
    return np.ascontiguousarray(values).reshape(*matrices, -1).view(np.uint8)


def _added(dithered: bool, position: int, shape: tuple[int, ...]) -> np.ndarray:
    """What is added before rounding down, of 2**16."""
    steps = fractions(position, shape) if dithered else np.full(shape, HALF, np.uint32)
    return steps >> 16


def _encode_f32(values: np.ndarray, position: int) -> np.ndarray:
    return bytes_of(values.astype(np.float32, copy=False), values.shape[:-2])


def _decode_f32(data: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return data.view(np.float32).reshape(*data.shape[:-1], rows, columns)


def _encode_bf16(dithered: bool, values: np.ndarray, position: int) -> np.ndarray:
    """The upper half of a float32, a fraction of its last bit added before; NaN stays as it is."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    upper = (bits + _added(dithered, position, values.shape)) >> 16
    kept = np.where(np.isnan(values), bits >> 16 | 0x40, upper).astype(np.uint16)
    return bytes_of(kept, values.shape[:-2])


def _decode_bf16(data: np.ndarray, rows: int, columns: int) -> np.ndarray:
    wide = data.view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(*data.shape[:-1], rows, columns)


def _encode_int8(dithered: bool, values: np.ndarray, position: int) -> np.ndarray:
    """A float32 for every column, its largest magnitude over 126.99; then multiples of those."""
    largest = np.abs(values).max(axis=-2, keepdims=True)
    inverse = np.divide(LEVELS, largest, out=np.zeros_like(largest), where=largest >= LEAST)
    added = _added(dithered, position, values.shape).astype(np.float32) * np.float32(2**-16)
    whole = np.rint(values * inverse + (added - np.float32(0.5))).astype(np.int8)
    parts = [bytes_of(part, values.shape[:-2]) for part in (largest * LEVEL, whole)]
    return np.concatenate(parts, axis=-1)


def _decode_int8(data: np.ndarray, rows: int, columns: int) -> np.ndarray:
    scales = np.ascontiguousarray(data[..., : 4 * columns]).view(np.float32)
    whole = data[..., 4 * columns :].view(np.int8).reshape(*data.shape[:-1], rows, columns)
    with np.errstate(invalid="ignore", over="ignore"):
        return scales[..., None, :] * whole


def _bf16(name: str, dithered: bool) -> StateType:
    encode = partial(_encode_bf16, dithered)
    return StateType(name, lambda k, v: 2 * k * v, encode, _decode_bf16, "bf16", dithered)


def _int8(name: str, dithered: bool) -> StateType:
    encode = partial(_encode_int8, dithered)
    return StateType(name, lambda k, v: (k + 4) * v, encode, _decode_int8, "int8", dithered, True)


F32 = StateType("f32", lambda k, v: 4 * k * v, _encode_f32, _decode_f32, "f32")
BF16, INT8 = _bf16("bf16", True), _int8("int8", True)
#: What dithering is held against.
BF16_NEAREST, INT8_NEAREST = _bf16("bf16-nearest", False), _int8("int8-nearest", False)

STATE_TYPES = {kind.name: kind for kind in (F32, BF16, INT8, BF16_NEAREST, INT8_NEAREST)}
#: Kernels that states of these types are given to.
KERNELS = tuple(dict.fromkeys(kind.kernel for kind in STATE_TYPES.values()))
