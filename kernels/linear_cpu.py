"""Numba kernels of `linear.py`: blocks of weight rows, each row kept in the cache for all tokens.

A sum runs over 16 lanes in the order of the row and ends in a fixed tree, for one token as for
four at a time; so a row's bits do not depend on how many came with it.
"""

from __future__ import annotations

import numpy as np

from .access import address, claim, present, rows, stride, width
from .intrinsics import (
    LANES,
    absolute,
    dot_bytes,
    f16_at,
    f32,
    fma,
    load,
    load_bf16,
    load_f16,
    load_first,
    load_first_bf16,
    load_first_f16,
    max_lanes,
    maximum,
    splat,
    store_bytes,
    sum_lanes,
)  # fmt: skip
from .jit import inline, kernel
from .linear import BLOCK

OUT, X, WEIGHT, BIAS = 0, 1, 2, 3
FLOAT = 4
TOKENS = 4
ROWS_A_BLOCK = 32
Q8_0_BYTES = 34
ZERO, BYTE_MAX, BYTE_INVERSE = np.float32(0), np.float32(127), np.float32(1 / 127)


def _float_dots(load_weight, load_first_weight, element_bytes):
    """Dot products of a float weight row with four rows of x, and with one."""

    @inline
    def four(weight, x, step, columns):
        a, b, c, d = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        whole = columns // LANES * LANES
        for column in range(0, whole, LANES):
            w, at = load_weight(weight + element_bytes * column), x + FLOAT * column
            a, b = fma(w, load(at), a), fma(w, load(at + step), b)
            c, d = fma(w, load(at + 2 * step), c), fma(w, load(at + 3 * step), d)
        if whole < columns:
            lanes, at = columns - whole, x + FLOAT * whole
            w = load_first_weight(weight + element_bytes * whole, lanes)
            a, b = fma(w, load_first(at, lanes), a), fma(w, load_first(at + step, lanes), b)
            c, d = (
                fma(w, load_first(at + 2 * step, lanes), c),
                fma(w, load_first(at + 3 * step, lanes), d),
            )
        return sum_lanes(a), sum_lanes(b), sum_lanes(c), sum_lanes(d)

    @inline
    def one(weight, x, columns):
        total = splat(ZERO)
        whole = columns // LANES * LANES
        for column in range(0, whole, LANES):
            total = fma(
                load_weight(weight + element_bytes * column), load(x + FLOAT * column), total
            )
        if whole < columns:
            lanes = columns - whole
            w = load_first_weight(weight + element_bytes * whole, lanes)
            total = fma(w, load_first(x + FLOAT * whole, lanes), total)
        return sum_lanes(total)

    return four, one


@inline
def _block_product(weight, x, scales, block, total):
    """Add one block's products, scaled, to 16 lane sums."""
    at = weight + Q8_0_BYTES * block
    scale = f16_at(at) * f32(scales)[block]
    return fma(dot_bytes(at + 2, x + BLOCK * block), splat(scale), total)


@inline
def _four_q8_0(weight, x, step, columns):
    a, b, c, d = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    for block in range(columns // BLOCK):
        a = _block_product(weight, x, x + columns, block, a)
        b = _block_product(weight, x + step, x + step + columns, block, b)
        c = _block_product(weight, x + 2 * step, x + 2 * step + columns, block, c)
        d = _block_product(weight, x + 3 * step, x + 3 * step + columns, block, d)
    return sum_lanes(a), sum_lanes(b), sum_lanes(c), sum_lanes(d)


@inline
def _one_q8_0(weight, x, columns):
    total = splat(ZERO)
    for block in range(columns // BLOCK):
        total = _block_product(weight, x, x + columns, block, total)
    return sum_lanes(total)


def _linear(name, four, one):
    @inline
    def weight_row(weight, columns, x, x_step, out, out_step, bias, count):
        """One output column: a weight row against all rows of x."""
        whole = count // TOKENS * TOKENS
        for row in range(0, whole, TOKENS):
            a, b, c, d = four(weight, x + row * x_step, x_step, columns)
            f32(out + row * out_step)[0] = a + bias
            f32(out + (row + 1) * out_step)[0] = b + bias
            f32(out + (row + 2) * out_step)[0] = c + bias
            f32(out + (row + 3) * out_step)[0] = d + bias
        for row in range(whole, count):
            f32(out + row * out_step)[0] = one(weight, x + row * x_step, columns) + bias

    @kernel(f"linear.{name}")
    def linear(op, context, thread, threads):
        out, x, weight = (
            address(op, context, OUT),
            address(op, context, X),
            address(op, context, WEIGHT),
        )
        outputs, columns, count = width(op, OUT), width(op, WEIGHT), rows(op, context)
        bias = address(op, context, BIAS) if present(op, BIAS) else 0
        block = claim(op, context)
        while block * ROWS_A_BLOCK < outputs:
            for column in range(block * ROWS_A_BLOCK, min(outputs, (block + 1) * ROWS_A_BLOCK)):
                addend = f32(bias)[column] if bias != 0 else ZERO
                weight_row(
                    weight + column * stride(op, WEIGHT), columns, x, stride(op, X),
                    out + FLOAT * column, stride(op, OUT), addend, count,
                )  # fmt: skip
            block = claim(op, context)


_linear("f32", *_float_dots(load, load_first, 4))
_linear("f16", *_float_dots(load_f16, load_first_f16, 2))
_linear("bf16", *_float_dots(load_bf16, load_first_bf16, 2))
_linear("q8_0", _four_q8_0, _one_q8_0)


@kernel("quantize")
def quantize(op, context, thread, threads):
    out, x, columns, count = (
        address(op, context, 0),
        address(op, context, 1),
        width(op, 1),
        rows(op, context),
    )
    row = claim(op, context)
    while row < count:
        target, source = out + row * stride(op, 0), x + row * stride(op, 1)
        for block in range(columns // BLOCK):
            at = source + FLOAT * BLOCK * block
            low, high = load(at), load(at + FLOAT * LANES)
            largest = max_lanes(maximum(absolute(low), absolute(high)))
            inverse = BYTE_MAX / largest if largest > ZERO else ZERO
            store_bytes(target + BLOCK * block, low * inverse)
            store_bytes(target + BLOCK * block + LANES, high * inverse)
            f32(target + columns)[block] = largest * BYTE_INVERSE
        row = claim(op, context)
