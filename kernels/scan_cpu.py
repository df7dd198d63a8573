"""Numba kernel of `scan.py`: channels in lanes, a strip of 16 of them through all rows."""

from __future__ import annotations

from .access import address, claim, claim_size, first_row, integer, sequences, state, stride, width
from .elementary import exp_down
from .intrinsics import LANES, f32, fma, load, load_first, prefetch, splat, store, store_first
from .jit import inline, kernel

OUT, X, DT, B, C, STATE, A, D = range(8)
FLOAT = 4
#: Bytes from what is read to what is asked for: four strips on, in the same row.
AHEAD = 4 * FLOAT * LANES


@inline
def _load_whole(address, lanes):
    return load(address)


@inline
def _store_whole(address, vector, lanes):
    store(address, vector)


def _strip(load, keep):
    """A function: all rows of one sequence over 16 channels, or the last few."""

    @inline
    def walk(op, context, sequence, at, lanes):
        columns, d_state = width(op, OUT), integer(op, 0)
        out, x, dt = address(op, context, OUT), address(op, context, X), address(op, context, DT)
        b, c = address(op, context, B), address(op, context, C)
        rates = address(op, context, A) + at
        skip = load(address(op, context, D) + at, lanes)
        states = state(op, context, STATE, sequence) + at
        for row in range(first_row(context, sequence), first_row(context, sequence + 1)):
            step = load(dt + row * stride(op, DT) + at, lanes)
            value = load(x + row * stride(op, X) + at, lanes)
            total, write = value * skip, step * value
            keys, queries = f32(b + row * stride(op, B)), f32(c + row * stride(op, C))
            rate, element = rates, states
            for n in range(d_state):
                prefetch(rate + AHEAD)
                prefetch(element + AHEAD)
                decay = exp_down(step * load(rate, lanes))
                updated = fma(load(element, lanes), decay, write * keys[n])
                keep(element, updated, lanes)
                total = fma(updated, splat(queries[n]), total)
                rate, element = rate + FLOAT * columns, element + FLOAT * columns
            keep(out + row * stride(op, OUT) + at, total, lanes)

    return walk


_whole, _part = _strip(_load_whole, _store_whole), _strip(load_first, store_first)


@kernel("selective_scan")
def selective_scan(op, context, thread, threads):
    columns = width(op, OUT)
    strips = (columns + LANES - 1) // LANES
    group = claim_size(strips, threads)
    groups = (strips + group - 1) // group
    block = claim(op, context)
    while block < groups * sequences(context):
        sequence, begin = block // groups, block % groups * group
        for strip in range(begin, min(strips, begin + group)):
            first = LANES * strip
            if first + LANES <= columns:
                _whole(op, context, sequence, FLOAT * first, LANES)
            else:
                _part(op, context, sequence, FLOAT * first, columns - first)
        block = claim(op, context)
