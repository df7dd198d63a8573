"""Numba kernel of `conv.py`: threads take strips of channels of one sequence, row after row."""

from __future__ import annotations

import numpy as np

from .access import (
    address,
    claim_near,
    first_row,
    integer,
    present,
    rows,
    sequences,
    state,
    stride,
    width,
)
from .elementary import silu
from .intrinsics import LANES, fma, load, load_first, splat, store_first
from .jit import inline, kernel

OUT, X, WINDOW, WEIGHT, BIAS = 0, 1, 2, 3, 4
FLOAT = 4
STRIP = 256
ROWS_A_BLOCK = 32
ZERO = np.float32(0)


@inline
def tap_address(x, step, window, columns, first, row, past):
    """Where the input of `row - past` lies: in the rows of this forward, or in the window."""
    if row - past >= first:
        return x + (row - past) * step
    return window + (row - past - first) * FLOAT * columns


@inline
def any_row(x, step, window, columns, first, row, taps, weight, total, at, lanes):
    """The sum over all taps, wherever their inputs lie."""
    for tap in range(taps):
        source = tap_address(x, step, window, columns, first, row, taps - 1 - tap)
        factor = load_first(weight + tap * FLOAT * columns + at, lanes)
        total = fma(load_first(source + at, lanes), factor, total)
    return total


@inline
def row_of_four(newest, step, weight, weight_step, total):
    """The same sum, in the same order, for four taps whose inputs are rows of this forward."""
    total = fma(load(newest - 3 * step), load(weight), total)
    total = fma(load(newest - 2 * step), load(weight + weight_step), total)
    total = fma(load(newest - step), load(weight + 2 * weight_step), total)
    return fma(load(newest), load(weight + 3 * weight_step), total)


@inline
def move_window(x, step, window, columns, first, after, taps, start, end):
    """Keep the last inputs. Oldest first, so that none is overwritten before it has moved on."""
    window_end = window + (taps - 1) * FLOAT * columns
    for tap in range(taps - 1):
        source = tap_address(x, step, window_end, columns, first, after, taps - 1 - tap)
        for column in range(start, end, LANES):
            lanes, at = min(LANES, end - column), FLOAT * column
            store_first(window + tap * FLOAT * columns + at, load_first(source + at, lanes), lanes)


@kernel("causal_conv")
def causal_conv(op, context, thread, threads):
    out, x, columns = address(op, context, OUT), address(op, context, X), width(op, OUT)
    weight, taps, activate = address(op, context, WEIGHT), integer(op, 0), integer(op, 1)
    bias = address(op, context, BIAS) if present(op, BIAS) else 0
    step, weight_step = stride(op, X), FLOAT * columns
    # Blocks are strips of channels of one sequence, or many of its rows, whole ones, in a prompt;
    # then only the first block of a sequence may look at its window.
    many = rows(op, context) >= 2 * ROWS_A_BLOCK and taps - 1 <= ROWS_A_BLOCK
    strip = columns if many else STRIP
    strips = (columns + strip - 1) // strip
    row_blocks = (rows(op, context) + ROWS_A_BLOCK - 1) // ROWS_A_BLOCK if many else 1
    blocks = row_blocks * strips * sequences(context)
    block = claim_near(op, context, thread, threads, blocks)
    while block < blocks:
        sequence, start = block // (row_blocks * strips), block % strips * strip
        end = min(columns, start + strip)
        first, after = first_row(context, sequence), first_row(context, sequence + 1)
        begin = first + block // strips % row_blocks * ROWS_A_BLOCK
        stop = min(after, begin + ROWS_A_BLOCK) if many else after
        # The row after the window's last: where an input of this forward's first row would lie.
        window = state(op, context, WINDOW, sequence)
        window_end = window + (taps - 1) * weight_step
        for row in range(begin, stop):
            here, to = x + row * step, out + row * stride(op, OUT)
            for column in range(start, end, LANES):
                lanes, at = min(LANES, end - column), FLOAT * column
                total = load_first(bias + at, lanes) if bias != 0 else splat(ZERO)
                if taps == 4 and lanes == LANES and row - first >= 3:
                    total = row_of_four(here + at, step, weight + at, weight_step, total)
                else:
                    total = any_row(
                        x, step, window_end, columns, first, row, taps, weight, total, at, lanes
                    )
                store_first(to + at, silu(total) if activate != 0 else total, lanes)
        # Who looks at the window is done with it.
        if begin == first:
            move_window(x, step, window, columns, first, after, taps, start, end)
        block = claim_near(op, context, thread, threads, blocks)
