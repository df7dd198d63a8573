"""Numba kernel of `scan.py`: channels in lanes, a strip of 16 of them through all rows."""

from __future__ import annotations

from .access import address, claim, first_row, integer, sequences, state, stride, width
from .elementary import exp
from .intrinsics import LANES, f32, fma, load_first, splat, store_first
from .jit import kernel

OUT, X, DT, B, C, STATE, A, D = range(8)
FLOAT = 4


@kernel("selective_scan")
def selective_scan(op, context, thread, threads):
    columns, d_state = width(op, OUT), integer(op, 0)
    out, x, dt = address(op, context, OUT), address(op, context, X), address(op, context, DT)
    b, c, a, d = (
        address(op, context, B),
        address(op, context, C),
        address(op, context, A),
        address(op, context, D),
    )
    strips = (columns + LANES - 1) // LANES
    block = claim(op, context)
    while block < strips * sequences(context):
        sequence, strip = block // strips, block % strips
        at, lanes = FLOAT * LANES * strip, min(LANES, columns - LANES * strip)
        states = state(op, context, STATE, sequence) + at
        for row in range(first_row(context, sequence), first_row(context, sequence + 1)):
            step = load_first(dt + row * stride(op, DT) + at, lanes)
            value = load_first(x + row * stride(op, X) + at, lanes)
            total = value * load_first(d + at, lanes)
            write = step * value
            keys, queries = f32(b + row * stride(op, B)), f32(c + row * stride(op, C))
            for n in range(d_state):
                decay = exp(step * load_first(a + n * FLOAT * columns + at, lanes))
                element = states + n * FLOAT * columns
                updated = fma(load_first(element, lanes), decay, write * keys[n])
                store_first(element, updated, lanes)
                total = fma(updated, splat(queries[n]), total)
            store_first(out + row * stride(op, OUT) + at, total, lanes)
        block = claim(op, context)
