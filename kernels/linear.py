"""Matrix products with weights as they are stored.

A Q8_0 weight meets activations rounded to 8 bits in blocks of 32, once per input; the definition
rounds them exactly as the kernel does, so that the two differ only by the order of a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .formats.blocks import Q8_0
from .op import MATRIX, OPTIONAL_VECTOR, ROWS, Kind, Op, Operand, ShapeError, Weight, expect

BLOCK = 32


def weight_type(operands: Mapping[str, Any], attributes: Mapping[str, Any]) -> str:
    """The kernel is chosen by the weight's type."""
    return operands["weight"].block.name.lower()


def linear_shape(x: Any, weight: Weight, bias: Weight | None = None, *, width: int) -> int:
    expect(weight, width, x.width)
    expect(bias, width)
    return width


def linear(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, width: int
) -> np.ndarray:
    """y = W x + b, row by row.

    x: (T, K) float32, or what `quantize` makes of it where W is Q8_0. weight: (width, K) float32.
    bias: (width,). Returns (T, width). Rows are multiplied one by one, so that a row's bits do not
    depend on how many came with it.
    """
    weight = weight.reshape(width, -1)
    if x.shape[1] != weight.shape[1]:
        x = dequantize(x)
    y = np.stack([weight @ row for row in x]) if len(x) else np.zeros((0, width), np.float32)
    return y if bias is None else y + bias


def quantized_width(width: int) -> int:
    """Float32 slots of a quantized row: a byte a value, then a scale a block."""
    return width // 4 + width // BLOCK


def quantize_shape(x: Any) -> int:
    if x.width % BLOCK:
        raise ShapeError(f"a row of {x.width} values does not divide into Q8_0 blocks of {BLOCK}")
    return quantized_width(x.width)


def quantize(x: np.ndarray) -> np.ndarray:
    """Round rows to blocks of 32 signed bytes with one float32 scale each, max |x| / 127.

    x: (T, K) float32. Returns (T, quantized_width(K)) float32 slots: K bytes, then K / 32 scales.
    Values are rounded to the nearest, ties to even.
    """
    blocks = x.reshape(len(x), x.shape[1] // BLOCK, BLOCK)
    largest = np.abs(blocks).max(axis=2)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    q = np.rint(blocks * inverse[..., None]).astype(np.int8).reshape(x.shape)
    return np.concatenate([q.view(np.float32), largest * np.float32(1 / 127)], axis=1)


def dequantize(slots: np.ndarray) -> np.ndarray:
    """The values that `quantize` kept: (T, quantized_width(K)) -> (T, K) float32."""
    count = slots.shape[1] // (BLOCK // 4 + 1)
    q = np.ascontiguousarray(slots[:, :-count]).view(np.int8).reshape(len(slots), count, BLOCK)
    return (q * slots[:, -count:, None]).reshape(len(slots), count * BLOCK)


OPS = (
    Op(
        "linear",
        {"x": Operand(Kind.ROWS, against="weight"), "weight": MATRIX, "bias": OPTIONAL_VECTOR},
        linear_shape,
        linear,
        ("width",),
        weight_type,
    ),
    Op("quantize", {"x": ROWS}, quantize_shape, quantize),
)

#: Weight types whose kernel reads activations through `quantize`.
QUANTIZED_ACTIVATIONS = frozenset({Q8_0})
