"""Numba kernel of `conv.py`: threads take strips of channels of one sequence, row after row."""

from __future__ import annotations

import numpy as np

from .access import address, claim, first_row, integer, present, sequences, state, stride, width
from .elementary import silu
from .intrinsics import LANES, fma, load_first, splat, store_first
from .jit import inline, kernel

OUT, X, WINDOW, WEIGHT, BIAS = 0, 1, 2, 3, 4
FLOAT = 4
STRIP = 256
ZERO = np.float32(0)


@inline
def tap_address(x, step, window, columns, first, row, past):
    """Where the input of `row - past` lies: in the rows of this forward, or in the window."""
    if row - past >= first:
        return x + (row - past) * step
    return window + (row - past - first) * FLOAT * columns


@kernel("causal_conv")
def causal_conv(op, context, thread, threads):
    out, x, columns = address(op, context, OUT), address(op, context, X), width(op, OUT)
    weight, taps, activate = address(op, context, WEIGHT), integer(op, 0), integer(op, 1)
    bias = address(op, context, BIAS) if present(op, BIAS) else 0
    step, strips = stride(op, X), (columns + STRIP - 1) // STRIP
    block = claim(op, context)
    while block < strips * sequences(context):
        sequence, start = block // strips, block % strips * STRIP
        end = min(columns, start + STRIP)
        first, after = first_row(context, sequence), first_row(context, sequence + 1)
        # The row after the window's last: where an input of this forward's first row would lie.
        window = state(op, context, WINDOW, sequence)
        window_end = window + (taps - 1) * FLOAT * columns
        for row in range(first, after):
            for column in range(start, end, LANES):
                lanes, at = min(LANES, end - column), FLOAT * column
                total = load_first(bias + at, lanes) if bias != 0 else splat(ZERO)
                for tap in range(taps):
                    source = tap_address(x, step, window_end, columns, first, row, taps - 1 - tap)
                    factor = load_first(weight + tap * FLOAT * columns + at, lanes)
                    total = fma(load_first(source + at, lanes), factor, total)
                total = silu(total) if activate != 0 else total
                store_first(out + row * stride(op, OUT) + at, total, lanes)
        # Oldest first, so that no input is overwritten before it has moved on.
        for tap in range(taps - 1):
            source = tap_address(x, step, window_end, columns, first, after, taps - 1 - tap)
            for column in range(start, end, LANES):
                lanes, at = min(LANES, end - column), FLOAT * column
                moved = load_first(source + at, lanes)
                store_first(window + tap * FLOAT * columns + at, moved, lanes)
        block = claim(op, context)
