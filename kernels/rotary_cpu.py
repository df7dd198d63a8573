"""Numba kernel of `rotary.py`: threads take rows; a pair's angle serves all heads."""

from __future__ import annotations

import numpy as np

from .access import (
    address,
    claim,
    first_row,
    integer,
    number,
    position,
    present,
    rows,
    sequence_of,
    stride,
    width,
)
from .columns_cpu import copy
from .intrinsics import f32
from .jit import inline, kernel

OUT, X, FACTORS = 0, 1, 3
FLOAT = 4
# pi / 2 in two parts (those of fdlibm): products of the first with whole numbers are exact.
QUARTERS_A_RADIAN = 0.63661977236758134308
QUARTER_HIGH, QUARTER_LOW = 1.57079632673412561417, 6.07710050650619224932e-11


@inline
def sine(r):
    """Taylor's series, good to 1e-12 for r from -pi / 4 to pi / 4."""
    s = r * r
    p = 1.0 / 6227020800
    p = p * s - 1.0 / 39916800
    p = p * s + 1.0 / 362880
    p = p * s - 1.0 / 5040
    p = p * s + 1.0 / 120
    p = p * s - 1.0 / 6
    return p * s * r + r


@inline
def cosine(r):
    """Taylor's series, good to 1e-12 for r from -pi / 4 to pi / 4."""
    s = r * r
    p = 1.0 / 479001600
    p = p * s - 1.0 / 3628800
    p = p * s + 1.0 / 40320
    p = p * s - 1.0 / 720
    p = p * s + 1.0 / 24
    p = p * s - 0.5
    return p * s + 1.0


@inline
def cosine_and_sine(angle):
    """Of an angle that is not negative, both float64; returns float32."""
    quarters = np.int64(angle * QUARTERS_A_RADIAN + 0.5)
    r = angle - quarters * QUARTER_HIGH - quarters * QUARTER_LOW
    c, s = cosine(r), sine(r)
    if quarters & 1:
        c, s = -s, c
    if quarters & 2:
        c, s = -c, -s
    return np.float32(c), np.float32(s)


@inline
def speed(op, pair, frequency, factors):
    """Radians a token that a pair turns by."""
    scale, low, high = number(op, 6), number(op, 7), number(op, 8)
    ramp = min(max((pair - low) / max(high - low, 1e-3), 0.0), 1.0)
    frequency *= 1.0 - ramp + ramp * scale
    if factors != 0:
        frequency /= f32(factors)[pair]
    return frequency


@kernel("rotary")
def rotary(op, context, thread, threads):
    columns, pairs, ratio = width(op, OUT), integer(op, 1) // 2, number(op, 4)
    heads, step, gap = integer(op, 0), integer(op, 2), integer(op, 3)
    first_value, magnitude = integer(op, 5), np.float32(number(op, 9))
    factors = address(op, context, FACTORS) if present(op, FACTORS) else 0
    d_head = columns // heads
    row = claim(op, context)
    while row < rows(op, context):
        sequence = sequence_of(context, row)
        token = position(context, sequence) + row - first_row(context, sequence)
        x = address(op, context, X) + row * stride(op, X)
        out = address(op, context, OUT) + row * stride(op, OUT)
        copy(x, out, columns)
        frequency = 1.0
        for pair in range(pairs):
            c, s = cosine_and_sine(token * speed(op, pair, frequency, factors))
            c, s = c * magnitude, s * magnitude
            for head in range(heads):
                at = head * d_head + first_value + pair * step
                first, second = f32(x)[at], f32(x)[at + gap]
                f32(out)[at] = first * c - second * s
                f32(out)[at + gap] = first * s + second * c
            frequency *= ratio
        row = claim(op, context)
