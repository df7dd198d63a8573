"""Numba kernels of `norm.py`: one thread a row, 16 lane sums and a fixed tree."""

from __future__ import annotations

import numpy as np

from .access import address, claim, integer, number, present, rows, stride, width
from .elementary import silu
from .intrinsics import LANES, fma, load_first, splat, store_first, sum_lanes
from .jit import inline, kernel
from .norm import GATE_FIRST, NORM_FIRST

OUT, X, WEIGHT, GATE = 0, 1, 2, 3
FLOAT = 4
ZERO, ONE = np.float32(0), np.float32(1)


@inline
def square_sum(x, columns):
    """The sum of squares of `columns` floats."""
    total = splat(ZERO)
    for column in range(0, columns, LANES):
        value = load_first(x + FLOAT * column, min(LANES, columns - column))
        total = fma(value, value, total)
    return sum_lanes(total)


@inline
def gated(x, gate, out, columns):
    """out = x * silu(gate)."""
    for column in range(0, columns, LANES):
        lanes = min(LANES, columns - column)
        value = load_first(x + FLOAT * column, lanes) * silu(
            load_first(gate + FLOAT * column, lanes)
        )
        store_first(out + FLOAT * column, value, lanes)


@inline
def scaled(x, weight, weighted, factor, out, columns):
    """out = x * factor (* weight)."""
    for column in range(0, columns, LANES):
        lanes = min(LANES, columns - column)
        value = load_first(x + FLOAT * column, lanes) * factor
        if weighted:
            value = value * load_first(weight + FLOAT * column, lanes)
        store_first(out + FLOAT * column, value, lanes)


@kernel("rms_norm")
def rms_norm(op, context, thread, threads):
    out, x, count = address(op, context, OUT), address(op, context, X), rows(op, context)
    eps, groups, order = np.float32(number(op, 0)), integer(op, 1), integer(op, 2)
    columns = width(op, OUT) // groups
    weighted = present(op, WEIGHT)
    weight = address(op, context, WEIGHT) if weighted else 0
    # A weight of one group's width serves every group.
    weight_step = FLOAT * columns if weighted and width(op, WEIGHT) > columns else 0
    gate = address(op, context, GATE) if order != 0 else 0
    row = claim(op, context)
    while row < count:
        for group in range(groups):
            source = x + row * stride(op, X) + group * FLOAT * columns
            target = out + row * stride(op, OUT) + group * FLOAT * columns
            gates = gate + row * stride(op, GATE) + group * FLOAT * columns
            if order == GATE_FIRST:
                gated(source, gates, target, columns)
                source = target
            mean = square_sum(source, columns) / np.float32(columns)
            factor = ONE / np.sqrt(mean + eps)
            scaled(source, weight + group * weight_step, weighted, factor, target, columns)
            if order == NORM_FIRST:
                gated(target, gates, target, columns)
        row = claim(op, context)


@kernel("l2_norm")
def l2_norm(op, context, thread, threads):
    out, x, count = address(op, context, OUT), address(op, context, X), rows(op, context)
    eps, groups, scale = np.float32(number(op, 0)), integer(op, 1), np.float32(number(op, 2))
    columns = width(op, OUT) // groups
    row = claim(op, context)
    while row < count:
        for group in range(groups):
            source = x + row * stride(op, X) + group * FLOAT * columns
            factor = scale / np.sqrt(square_sum(source, columns) + eps)
            scaled(
                source,
                0,
                False,
                factor,
                out + row * stride(op, OUT) + group * FLOAT * columns,
                columns,
            )
        row = claim(op, context)
