"""Matrix products with weights as they are stored.

A quantized weight meets activations rounded to 8 bits in blocks of 32, once per input; the
definition rounds them as the kernel does, so that the two differ only by the order of a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .op import MATRIX, OPTIONAL_VECTOR, ROWS, Kind, Op, Operand, ShapeError, Weight, expect
from .rounding import BLOCK, round_blocks

#: Bytes of what a kernel is told of a block of activations; see `quantize`.
RECORD = 16


def weight_type(operands: Mapping[str, Any], attributes: Mapping[str, Any]) -> str:
    """The kernel is chosen by the weight's type."""
    return operands["weight"].block.name.lower()


def _linear_shape(x: Any, weight: Weight, bias: Weight | None = None, *, width: int) -> int:
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
    return y if bias is None else y + bias.reshape(-1)


def quantized_width(width: int) -> int:
    """Float32 slots of a quantized row: a byte a value, then a record a block."""
    return width // 4 + width // BLOCK * RECORD // 4


def _quantize_shape(x: Any, *, parts: int = 1) -> int:
    if x.width % (BLOCK * parts):
        raise ShapeError(
            f"a row of {x.width} values in {parts} parts does not divide into blocks of {BLOCK}"
        )
    return quantized_width(x.width)


def quantize(x: np.ndarray, *, parts: int = 1) -> np.ndarray:
    """Round rows to blocks of 32 signed bytes with one float32 scale each, as `round_blocks` does.

    x: (T, K) float32. Returns (T, quantized_width(K)) float32 slots: K bytes, then a record of 16
    bytes a block: the scale and the sum of the 32 bytes as float32, and -32 times the sums of its
    halves as int32. With `parts`, this goes for each part of a row by itself, one behind the other.
    """
    count = len(x)
    x = x.reshape(count * parts, x.shape[1] // parts)
    q, units = round_blocks(x)
    halves = q.reshape(*q.shape[:2], 2, BLOCK // 2).sum(axis=3, dtype=np.int32)
    records = np.empty((*q.shape[:2], RECORD // 4), np.float32)
    records[..., 0] = units
    records[..., 1] = halves.sum(axis=2)
    records[..., 2:] = (-32 * halves).view(np.float32)
    width = q.shape[1] * (RECORD // 4)
    both = [q.reshape(x.shape).view(np.float32), records.reshape(len(x), width)]
    return np.concatenate(both, axis=1).reshape(count, parts * quantized_width(x.shape[1]))


def dequantize(slots: np.ndarray) -> np.ndarray:
    """The values that `quantize` kept: (T, quantized_width(K)) -> (T, K) float32."""
    blocks = slots.shape[1] // ((BLOCK + RECORD) // 4)
    columns = blocks * BLOCK // 4
    q = np.ascontiguousarray(slots[:, :columns]).view(np.int8).reshape(len(slots), blocks, BLOCK)
    scales = slots[:, columns:].reshape(len(slots), blocks, RECORD // 4)[..., :1]
    return (q * scales).reshape(len(slots), blocks * BLOCK)


OPS = (
    Op(
        "linear",
        {"x": Operand(Kind.ROWS, against="weight"), "weight": MATRIX, "bias": OPTIONAL_VECTOR},
        _linear_shape,
        linear,
        ("width",),
        weight_type,
    ),
    Op("quantize", {"x": ROWS}, _quantize_shape, quantize, ("parts",)),
)
