"""Numba kernels of `columns.py`: threads take rows."""

from __future__ import annotations

from .access import address, claim, integer, rows, stride, width
from .intrinsics import LANES, load_first, store_first
from .jit import inline, kernel

OUT, X, Y = 0, 1, 2
FLOAT = 4


def copies(load_lanes, element_bytes):
    """A function (source, target, columns): write a row's numbers as floats."""

    @inline
    def copy(source, target, columns):
        for column in range(0, columns, LANES):
            lanes = min(LANES, columns - column)
            value = load_lanes(source + element_bytes * column, lanes)
            store_first(target + FLOAT * column, value, lanes)

    return copy


copy = copies(load_first, FLOAT)


@kernel("columns")
def columns(op, context, thread, threads):
    groups, start, kept = integer(op, 0), integer(op, 1), integer(op, 2)
    part = width(op, X) // groups
    row = claim(op, context)
    while row < rows(op, context):
        source = address(op, context, X) + row * stride(op, X) + FLOAT * start
        target = address(op, context, OUT) + row * stride(op, OUT)
        for group in range(groups):
            copy(source + FLOAT * group * part, target + FLOAT * group * kept, kept)
        row = claim(op, context)


@kernel("join")
def join(op, context, thread, threads):
    groups = integer(op, 0)
    first, second = width(op, X) // groups, width(op, Y) // groups
    row = claim(op, context)
    while row < rows(op, context):
        x = address(op, context, X) + row * stride(op, X)
        y = address(op, context, Y) + row * stride(op, Y)
        target = address(op, context, OUT) + row * stride(op, OUT)
        for group in range(groups):
            copy(x + FLOAT * group * first, target, first)
            copy(y + FLOAT * group * second, target + FLOAT * first, second)
            target += FLOAT * (first + second)
        row = claim(op, context)
