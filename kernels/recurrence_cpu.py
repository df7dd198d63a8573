"""Numba kernels of `recurrence.py`: columns of S in lanes, so that a sum over keys has one order.

A strip of columns of one head's state stays in the cache while all rows pass over it; the columns
of S never meet, so strips go to any thread. A row passes over its strip once: while the state is
updated, its product with the query is summed, and for the delta rule that with the next row's key.
"""

from __future__ import annotations

import numpy as np

from . import dither as dithers
from . import recurrence as definitions
from .access import (
    address,
    claim_near,
    first_row,
    integer,
    position,
    present,
    scratch_of,
    sequences,
    state,
    stride,
    width,
)
from .dither import ROW_STEP
from .elementary import exp
from .intrinsics import LANES, f32, fetch, load_first, prefetch, splat, store_first
from .jit import inline, kernel
from .narrow import columns_of, step_of
from .statetypes import KERNELS, LEAST, LEVEL, LEVELS, STATE_TYPES, ending
from .strips import first_lane, fraction_of, larger_magnitude, minus, plus_scaled, product, scaled
from .tiles import zeros

OUT, Q, K, V, DT, BETA, STATE, A, D = range(9)
FLOAT = 4
#: Bytes between what is read and what is asked for. The delta rule, which first passes over a head
#: to sum, finds it in the cache.
AHEAD = 4096
GROUPED, DECAYED = definitions.GROUPED, definitions.DECAYED
COLUMNS = definitions.STRIP
#: Vectors side by side where a head has columns enough.
WIDE = COLUMNS // LANES
ZERO, ONE = np.float32(0), np.float32(1)


@inline
def head_decay(dt, rate):
    """exp(A dt), one number."""
    return first_lane(exp(splat(rate * f32(dt)[0])))


def _decays(erases):
    """A function: exp(A dt) of rows `first` to `end` by key, and their products with the keys."""

    @inline
    def fill(op, context, first, end, head, key_head, decays, products):
        d_key = width(op, K) // integer(op, 1)
        rate = f32(address(op, context, A))[head] if present(op, A) else ONE
        for row in range(first, end):
            dt = address(op, context, DT) + row * stride(op, DT) + FLOAT * head * d_key
            keys = address(op, context, K) + row * stride(op, K) + FLOAT * key_head * d_key
            for key in range(0, d_key, LANES):
                at, lanes = FLOAT * key, min(LANES, d_key - key)
                decay = exp(load_first(dt + at, lanes) * rate)
                store_first(decays + at, decay, lanes)
                if erases:
                    store_first(products + at, decay * load_first(keys + at, lanes), lanes)
            decays, products = decays + FLOAT * d_key, products + FLOAT * d_key

    return fill


def _at_once(per_key, erases, kind, count):
    """Two functions for a state of type `kind` whose values are rounded one by one.

    What the delta rule sums up is over the state as it was kept.
    """
    recall, keep = columns_of(kind, count, count > 1)
    nothing, nbytes = zeros(count), step_of(kind) * LANES * count

    @inline
    def stored(state, step, scales, keys, d_key, lanes):
        """S^T k."""
        total = nothing()
        for key in range(d_key):
            total = plus_scaled(total, recall(state + key * step, lanes), f32(keys)[key])
        return total

    @inline
    def update(
        state, step, scales, work, keys, queries, following, decays, decay, write, d_key, lanes,
        place, dither,
    ):  # fmt: skip
        """S = D S + k u^T; returns S^T q, and S^T k of the following row."""
        out, held = nothing(), nothing()
        for key in range(d_key):
            if per_key:
                decay = f32(decays)[key]
            at = state + key * step
            if not erases:
                fetch(at + AHEAD, nbytes)
            updated = plus_scaled(scaled(recall(at, lanes), decay), write, f32(keys)[key])
            kept = keep(updated, at, lanes, place + (key * ROW_STEP & dither), dither)
            out = plus_scaled(out, updated, f32(queries)[key])
            if erases:
                held = plus_scaled(held, kept, f32(following)[key])
        return out, held

    return stored, update


def _in_two(per_key, erases, kind, count):
    """`_at_once` for a type with a scale for each column, which is known at the end only."""
    load, store = columns_of("f32", count, count > 1)
    recall, keep = columns_of(kind, count, count > 1)
    load_work, store_work = columns_of("f32", count, True)
    nothing, size = zeros(count), FLOAT * LANES * count

    @inline
    def stored(state, step, scales, keys, d_key, lanes):
        total = nothing()
        for key in range(d_key):
            total = plus_scaled(total, recall(state + key * step, lanes), f32(keys)[key])
        return product(total, load(scales, lanes))

    @inline
    def update(
        state, step, scales, work, keys, queries, following, decays, decay, write, d_key, lanes,
        place, dither,
    ):  # fmt: skip
        out, held, largest = nothing(), nothing(), nothing()
        unit = load(scales, lanes)
        if not per_key:
            unit = scaled(unit, decay)
        for key in range(d_key):
            factor = scaled(unit, f32(decays)[key]) if per_key else unit
            updated = product(recall(state + key * step, lanes), factor)
            updated = plus_scaled(updated, write, f32(keys)[key])
            store_work(updated, work + key * size, LANES, 0, 0)
            out = plus_scaled(out, updated, f32(queries)[key])
            largest = larger_magnitude(largest, updated)
        inverse, unit = fraction_of(LEVELS, largest, LEAST), scaled(largest, LEVEL)
        store(unit, scales, lanes, 0, 0)
        for key in range(d_key):
            # The next head's values, while there is nothing else to read.
            prefetch(state + (d_key + key) * step)
            ratio = product(load_work(work + key * size, LANES), inverse)
            fraction = place + (key * ROW_STEP & dither)
            kept = keep(ratio, state + key * step, lanes, fraction, dither)
            if erases:
                held = plus_scaled(held, kept, f32(following)[key])
        return out, product(held, unit)

    return stored, update


def _pass(per_key, erases, kind, count):
    """A function: rows `first` to `end` of one sequence over one strip of a state of type `kind`.

    The delta rule needs what the state, decayed, holds under a key, (D S)^T k. It is summed up as
    S^T k while the row before updates the state, and multiplied by the decay; where that is another
    one for each key, k is multiplied before.
    """
    load, store = columns_of("f32", count, count > 1)
    updates = _in_two if STATE_TYPES[kind].scaled else _at_once
    stored, update = updates(per_key, erases, kind, count)
    nothing, size = zeros(count), step_of(kind)

    @inline
    def walk(
        op, context, first, end, head, key_head, column, matrix, scales, lanes, token, decays,
        products, work,
    ):  # fmt: skip
        """`column`: the strip's first one; `token`: the position of row `first` in its text."""
        heads, key_heads = integer(op, 0), integer(op, 1)
        d_key, d_value = width(op, K) // key_heads, width(op, V) // heads
        step, key_at = size * d_value, FLOAT * key_head * d_key
        at, dither = FLOAT * (head * d_value + column), width(op, STATE)
        rate = f32(address(op, context, A))[head] if present(op, A) else ONE
        skip = f32(address(op, context, D))[head] if present(op, D) else ZERO
        keys = address(op, context, K) + key_at + first * stride(op, K)
        # Under what is summed, and how far it is from one row's to the next one's.
        marks, mark_step = (products, FLOAT * d_key) if per_key else (keys, stride(op, K))
        held, decay = nothing(), ONE
        if erases:
            held = stored(matrix, step, scales, marks, d_key, lanes)
        for row in range(first, end):
            queries = address(op, context, Q) + key_at + row * stride(op, Q)
            value = load(address(op, context, V) + row * stride(op, V) + at, lanes)
            if not per_key:
                dt = address(op, context, DT) + row * stride(op, DT) + FLOAT * head
                decay = head_decay(dt, rate)
            write = minus(value, scaled(held, decay)) if erases else value
            beta = f32(address(op, context, BETA) + row * stride(op, BETA))[head]
            # What the last row's sum is of does not matter.
            marks += mark_step if row + 1 < end else 0
            out, held = update(
                matrix, step, scales, work, keys, queries, marks, decays, decay,
                scaled(write, beta), d_key, lanes,
                start_of(token + row - first, head, dither), dither,
            )  # fmt: skip
            out = plus_scaled(out, value, skip)
            store(out, address(op, context, OUT) + row * stride(op, OUT) + at, lanes, 0, 0)
            keys, decays = keys + stride(op, K), decays + FLOAT * d_key

    return walk


decay_memory, start_of = inline(definitions.decay_memory), inline(dithers.start_of)


def _recurrence(decay, erase, kind):
    per_key, erases, size = decay == "key", erase == "tied", step_of(kind)
    wide, narrow = (_pass(per_key, erases, kind, count) for count in (WIDE, 1))
    header = FLOAT if STATE_TYPES[kind].scaled else 0
    fill = _decays(erases)

    @inline
    def strips(
        op, context, sequence, first, end, head, key_head, column, last, decays, products, work
    ):
        """Rows `first` to `end` over the columns up to `last` of a head."""
        own = state(op, context, STATE, sequence) + head * stride(op, STATE)
        values = own + header * (width(op, V) // integer(op, 0))
        token = position(context, sequence) + first - first_row(context, sequence)
        while column < last:
            matrix, scales = values + size * column, own + FLOAT * column
            if column + COLUMNS <= last:
                wide(
                    op, context, first, end, head, key_head, column, matrix, scales, LANES, token,
                    decays, products, work,
                )  # fmt: skip
                column += COLUMNS
            else:
                narrow(
                    op, context, first, end, head, key_head, column, matrix, scales,
                    min(LANES, last - column), token, decays, products, work,
                )  # fmt: skip
                column += LANES

    @kernel(f"recurrence.{decay}_{erase}{ending(kind)}")
    def recurrence(op, context, thread, threads):
        heads, key_heads, mapping = integer(op, 0), integer(op, 1), integer(op, 2)
        d_key, d_value = width(op, K) // key_heads, width(op, V) // heads
        # Decays by key are worked out once for all columns of a head, so these stay together.
        columns = d_value if per_key else COLUMNS
        pieces = (d_value + columns - 1) // columns
        decays = scratch_of(context, thread)
        products = decays + decay_memory(d_key)[0]
        work = decays + (decay_memory(d_key)[1] if per_key else 0)
        blocks = sequences(context) * heads * pieces
        block = claim_near(op, context, thread, threads, blocks)
        while block < blocks:
            sequence, head = block // (heads * pieces), block // pieces % heads
            key_head = head // (heads // key_heads) if mapping == GROUPED else head % key_heads
            column = block % pieces * columns
            first, end = first_row(context, sequence), first_row(context, sequence + 1)
            while first < end:
                last = min(end, first + DECAYED) if per_key else end
                if per_key:
                    fill(op, context, first, last, head, key_head, decays, products)
                strips(
                    op, context, sequence, first, last, head, key_head, column,
                    min(d_value, column + columns), decays, products, work,
                )  # fmt: skip
                first = last
            block = claim_near(op, context, thread, threads, blocks)


for _decay in ("head", "key"):
    for _erase in ("none", "tied"):
        for _kind in KERNELS:
            _recurrence(_decay, _erase, _kind)
