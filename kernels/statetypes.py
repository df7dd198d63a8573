"""In what types the matrix states of a recurrence may be kept; it is computed in float32 in all.

A state is rounded after every token, also where many are read at once, so that it depends on the
tokens alone and not on how they arrived. Definitions are given float32 values and an object that
rounds them; kernels load and store the bytes that `encode` describes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dither import fractions


@dataclass(frozen=True, slots=True)
class StateType:
    """How a matrix (K, V) of a state is kept.

    encode  (..., K, V) float32, as they are behind the token of a position ->
            (..., bytes of a matrix) uint8
    decode  those bytes and (K, V) -> (..., K, V) float32
    """

    name: str
    matrix_bytes: Callable[[int, int], int]
    encode: Callable[[np.ndarray, int], np.ndarray]
    decode: Callable[[np.ndarray, int, int], np.ndarray]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a whole tensor of matrices."""
        return math.prod(shape[:-2]) * self.matrix_bytes(shape[-2], shape[-1])


def bytes_of(values: np.ndarray, matrices: tuple[int, ...]) -> np.ndarray:
    """The memory of an array, a row of bytes for each of its matrices."""
    return np.ascontiguousarray(values).reshape(*matrices, -1).view(np.uint8)


def _encode_f32(values: np.ndarray, position: int) -> np.ndarray:
    return bytes_of(values.astype(np.float32, copy=False), values.shape[:-2])


def _decode_f32(data: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return data.view(np.float32).reshape(*data.shape[:-1], rows, columns)


def _encode_bf16(values: np.ndarray, position: int) -> np.ndarray:
    """The upper half of a float32, a fraction of its last bit added before; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    upper = (bits + (fractions(position, values.shape) >> 16)) >> 16
    kept = np.where(np.isnan(values), 0x7FC0, upper).astype(np.uint16)
    return bytes_of(kept, values.shape[:-2])


def _decode_bf16(data: np.ndarray, rows: int, columns: int) -> np.ndarray:
    wide = data.view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(*data.shape[:-1], rows, columns)


F32 = StateType("f32", lambda rows, columns: 4 * rows * columns, _encode_f32, _decode_f32)
BF16 = StateType("bf16", lambda rows, columns: 2 * rows * columns, _encode_bf16, _decode_bf16)

STATE_TYPES = {kind.name: kind for kind in (F32, BF16)}


def variant_of(place: Any) -> str:
    """How the name of a kernel ends that takes a state as it is kept; nothing for float32."""
    return "" if place.kind is F32 else f"_{place.kind.name}"
