"""Numba kernels of `scan.py`: channels in lanes, a strip of 16 of them through all rows."""

from __future__ import annotations

import numpy as np

from . import dither as dithers
from .access import (
    address,
    claim_near,
    claim_size,
    first_row,
    integer,
    position,
    scratch_of,
    sequences,
    state,
    stride,
    width,
)
from .dither import ROW_STEP
from .elementary import exp_down
from .intrinsics import LANES, f32, fma, load, load_first, prefetch, splat, store, store_first
from .jit import inline, kernel
from .narrow import columns_of, step_of
from .statetypes import KERNELS, LEAST, LEVEL, LEVELS, STATE_TYPES, ending
from .strips import as_strip, fraction_of, larger_magnitude, vector_of

OUT, X, DT, B, C, STATE, A, D = range(8)
FLOAT, ZERO = 4, np.float32(0)
#: Bytes from what is read to what is asked for: four strips on, in the same row.
AHEAD = 4 * FLOAT * LANES


start_of = inline(dithers.start_of)


@inline
def _load_whole(address, lanes):
    return load(address)


@inline
def _store_whole(address, vector, lanes):
    store(address, vector)


def _at_once(kind, whole):
    """A function for a state of type `kind` whose values are rounded one by one."""
    take = _load_whole if whole else load_first
    recall, keep = columns_of(kind, 1, whole)
    size = step_of(kind)

    @inline
    def update(
        states, scales, work, rate, columns, d_state, step, write, keys, queries, total, lanes,
        place, dither,
    ):  # fmt: skip
        """S = exp(dt A) S + dt x B for 16 channels; returns C S + `total`."""
        for n in range(d_state):
            prefetch(rate + AHEAD)
            prefetch(states + AHEAD)
            decay = exp_down(step * take(rate, lanes))
            updated = fma(vector_of(recall(states, lanes)), decay, write * keys[n])
            keep(as_strip(updated), states, lanes, place + (n * ROW_STEP & dither), dither)
            total = fma(updated, splat(queries[n]), total)
            rate, states = rate + FLOAT * columns, states + size * columns
        return total

    return update


def _in_two(kind, whole):
    """`_at_once` for a type with a scale for each channel, which is known at the end only."""
    take, put = (_load_whole, _store_whole) if whole else (load_first, store_first)
    recall, keep = columns_of(kind, 1, whole)
    size, width_of_work = step_of(kind), FLOAT * LANES

    @inline
    def update(
        states, scales, work, rate, columns, d_state, step, write, keys, queries, total, lanes,
        place, dither,
    ):  # fmt: skip
        unit, largest = take(scales, lanes), as_strip(splat(ZERO))
        element = states
        for n in range(d_state):
            prefetch(rate + AHEAD)
            prefetch(element + AHEAD)
            decay = exp_down(step * take(rate, lanes))
            before = vector_of(recall(element, lanes)) * unit
            updated = fma(before, decay, write * keys[n])
            store(work + n * width_of_work, updated)
            largest = larger_magnitude(largest, as_strip(updated))
            total = fma(updated, splat(queries[n]), total)
            rate, element = rate + FLOAT * columns, element + size * columns
        inverse = vector_of(fraction_of(LEVELS, largest, LEAST))
        put(scales, vector_of(largest) * LEVEL, lanes)
        for n in range(d_state):
            ratio = as_strip(load(work + n * width_of_work) * inverse)
            keep(ratio, states + n * size * columns, lanes, place + (n * ROW_STEP & dither), dither)
        return total

    return update


def _strip(kind, whole):
    """A function: all rows of one sequence over 16 channels, or the last few."""
    take, put = (_load_whole, _store_whole) if whole else (load_first, store_first)
    update = (_in_two if STATE_TYPES[kind].scaled else _at_once)(kind, whole)
    size, header = step_of(kind), FLOAT if STATE_TYPES[kind].scaled else 0

    @inline
    def walk(op, context, sequence, first, lanes, work):
        columns, d_state, at = width(op, OUT), integer(op, 0), FLOAT * first
        out, x, dt = address(op, context, OUT), address(op, context, X), address(op, context, DT)
        b, c = address(op, context, B), address(op, context, C)
        rates, dither = address(op, context, A) + at, width(op, STATE)
        skip = take(address(op, context, D) + at, lanes)
        own = state(op, context, STATE, sequence)
        begin, token = first_row(context, sequence), position(context, sequence)
        for row in range(begin, first_row(context, sequence + 1)):
            step = take(dt + row * stride(op, DT) + at, lanes)
            value = take(x + row * stride(op, X) + at, lanes)
            total = update(
                own + header * columns + size * first, own + at, work, rates, columns, d_state,
                step, step * value, f32(b + row * stride(op, B)), f32(c + row * stride(op, C)),
                value * skip, lanes, start_of(token + row - begin, 0, dither), dither,
            )  # fmt: skip
            put(out + row * stride(op, OUT) + at, total, lanes)

    return walk


def _scan(kind):
    whole, part = _strip(kind, True), _strip(kind, False)

    @kernel(f"selective_scan{ending(kind).replace('_', '.')}")
    def selective_scan(op, context, thread, threads):
        columns = width(op, OUT)
        strips = (columns + LANES - 1) // LANES
        group = claim_size(strips, threads)
        groups = (strips + group - 1) // group
        work = scratch_of(context, thread)
        blocks = groups * sequences(context)
        block = claim_near(op, context, thread, threads, blocks)
        while block < blocks:
            sequence, begin = block // groups, block % groups * group
            for strip in range(begin, min(strips, begin + group)):
                first = LANES * strip
                if first + LANES <= columns:
                    whole(op, context, sequence, first, LANES, work)
                else:
                    part(op, context, sequence, first, columns - first, work)
            block = claim_near(op, context, thread, threads, blocks)


for _kind in KERNELS:
    _scan(_kind)
