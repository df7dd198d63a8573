"""Numba kernels of `scan.py`: channels in lanes, a strip of 16 of them through all rows."""

from __future__ import annotations

from . import dither
from .access import (
    address,
    claim,
    claim_size,
    first_row,
    integer,
    position,
    sequences,
    state,
    stride,
    width,
)
from .dither import COLUMN_STEP, ROW_STEP
from .elementary import exp_down
from .intrinsics import LANES, f32, fma, load, load_first, prefetch, splat, store, store_first
from .jit import inline, kernel
from .narrow import columns_of, step_of
from .statetypes import STATE_TYPES
from .strips import as_strip, vector_of

OUT, X, DT, B, C, STATE, A, D = range(8)
FLOAT = 4
#: Bytes from what is read to what is asked for: four strips on, in the same row.
AHEAD = 4 * FLOAT * LANES


start_of = inline(dither.start_of)


@inline
def _load_whole(address, lanes):
    return load(address)


@inline
def _store_whole(address, vector, lanes):
    store(address, vector)


def _state(kind, whole):
    """How 16 values of a state of type `kind` are loaded and kept, all of them or the first."""
    recall_strip, keep_strip = columns_of(kind, 1, whole)

    @inline
    def recall(address, lanes):
        return vector_of(recall_strip(address, lanes))

    @inline
    def keep(vector, address, lanes, place):
        keep_strip(as_strip(vector), address, lanes, place)

    return recall, keep


def _strip(kind, whole):
    """A function: all rows of one sequence over 16 channels, or the last few."""
    take, put = (_load_whole, _store_whole) if whole else (load_first, store_first)
    recall, keep = _state(kind, whole)
    size = step_of(kind)

    @inline
    def walk(op, context, sequence, first, lanes):
        columns, d_state, at = width(op, OUT), integer(op, 0), FLOAT * first
        out, x, dt = address(op, context, OUT), address(op, context, X), address(op, context, DT)
        b, c = address(op, context, B), address(op, context, C)
        rates = address(op, context, A) + at
        skip = take(address(op, context, D) + at, lanes)
        states = state(op, context, STATE, sequence) + size * first
        begin, token = first_row(context, sequence), position(context, sequence)
        for row in range(begin, first_row(context, sequence + 1)):
            step = take(dt + row * stride(op, DT) + at, lanes)
            value = take(x + row * stride(op, X) + at, lanes)
            total, write = value * skip, step * value
            keys, queries = f32(b + row * stride(op, B)), f32(c + row * stride(op, C))
            rate, element = rates, states
            place = start_of(token + row - begin, 0) + first * COLUMN_STEP
            for n in range(d_state):
                prefetch(rate + AHEAD)
                prefetch(element + AHEAD)
                decay = exp_down(step * take(rate, lanes))
                updated = fma(recall(element, lanes), decay, write * keys[n])
                keep(updated, element, lanes, place + n * ROW_STEP)
                total = fma(updated, splat(queries[n]), total)
                rate, element = rate + FLOAT * columns, element + size * columns
            put(out + row * stride(op, OUT) + at, total, lanes)

    return walk


def _scan(kind):
    whole, part = _strip(kind, True), _strip(kind, False)

    @kernel("selective_scan" if kind == "f32" else f"selective_scan.{kind}")
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
                    whole(op, context, sequence, first, LANES)
                else:
                    part(op, context, sequence, first, columns - first)
            block = claim(op, context)


for _kind in STATE_TYPES:
    _scan(_kind)
