"""Numba kernel of `importance.py`: threads take strips of columns of one sequence, row by row."""

from __future__ import annotations

import numpy as np

from .access import (
    address,
    claim,
    first_row,
    integer,
    present,
    sequences,
    state,
    stride,
    width,
)
from .intrinsics import LANES, f32, fma, load_first, store_first
from .jit import inline, kernel

X, ROUTES, SUMS = 1, 2, 3
FLOAT = 4
#: Columns of a claim.
STRIP = 256
ONE = np.float32(1)


@inline
def add_squares(x, sums, columns):
    """sums += x * x."""
    for column in range(0, columns, LANES):
        at, lanes = FLOAT * column, min(LANES, columns - column)
        value = load_first(x + at, lanes)
        store_first(sums + at, fma(value, value, load_first(sums + at, lanes)), lanes)


@kernel("sum_squares")
def sum_squares(op, context, thread, threads):
    used, parts = integer(op, 1), integer(op, 2)
    part = width(op, X) // parts
    x, routed = address(op, context, X), present(op, ROUTES)
    routes = address(op, context, ROUTES) if routed else 0
    strips = (part + STRIP - 1) // STRIP
    block = claim(op, context)
    while block < strips * sequences(context):
        sequence, start = block // strips, block % strips * STRIP
        columns = min(STRIP, part - start)
        sums = state(op, context, SUMS, sequence)
        for row in range(first_row(context, sequence), first_row(context, sequence + 1)):
            for rank in range(used):
                matrix = np.int64(rank)
                if routed:
                    matrix = np.int64(f32(routes + row * stride(op, ROUTES))[rank])
                mine = rank * part if parts > 1 else 0
                source = x + row * stride(op, X) + FLOAT * (mine + start)
                target = sums + FLOAT * matrix * (part + 1)
                add_squares(source, target + FLOAT * start, columns)
                if start == 0:
                    f32(target)[part] += ONE
        block = claim(op, context)
