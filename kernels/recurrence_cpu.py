"""Numba kernels of `recurrence.py`: columns of S in lanes, so that a sum over keys has one order.

A strip of columns of one head's state stays in the cache while all rows pass over it; the columns
of S never meet, so strips go to any thread. A row passes over its strip once: while the state is
updated, its product with the query is summed, and for the delta rule that with the next row's key.
"""

from __future__ import annotations

import numpy as np

from .access import address, claim, first_row, integer, present, sequences, state, stride, width
from .elementary import exp
from .intrinsics import LANES, f32, load_first, splat, store_first
from .jit import inline, kernel
from .recurrence import GROUPED
from .strips import (
    as_strip,
    first_lane,
    less,
    load_strip,
    plus_scaled,
    scaled,
    store_strip,
    vector_of,
)
from .tiles import zeros

OUT, Q, K, V, DT, BETA, STATE, A, D = range(9)
FLOAT = 4
#: Vectors side by side where a head has columns enough.
WIDE = 4
ZERO, ONE = np.float32(0), np.float32(1)


def _columns(count):
    """How `count` vectors of columns are loaded and stored; the last columns are one vector."""
    if count == WIDE:
        load_all = load_strip(count)

        @inline
        def load(address, lanes):
            return load_all(address)

        @inline
        def store(strip, address, lanes):
            store_strip(strip, address)
    else:

        @inline
        def load(address, lanes):
            return as_strip(load_first(address, lanes))

        @inline
        def store(strip, address, lanes):
            store_first(address, vector_of(strip), lanes)

    return load, store


def _pass(decay, erase, count):
    """A function: all rows of one sequence over one strip of columns."""
    per_key, erases = decay == "key", erase == "tied"
    load, store = _columns(count)
    nothing = zeros(count)

    @inline
    def factor(dt, rate, key):
        """The decay of row `key` of S: exp(A dt)."""
        return first_lane(exp(splat(rate * f32(dt)[key if per_key else 0])))

    @inline
    def stored(state, step, keys, dt, rate, d_key, lanes):
        """What the state holds under a key: S^T k, of rows decayed one by one (D S)^T k."""
        total = nothing()
        for key in range(d_key):
            number = f32(keys)[key]
            if per_key:
                number = number * factor(dt, rate, key)
            total = plus_scaled(total, load(state + key * step, lanes), number)
        return total

    @inline
    def update(state, step, keys, queries, following, dt, rate, decay, write, d_key, lanes):
        """S = D S + k u^T; returns S^T q, and S^T k of the following row."""
        out, held = nothing(), nothing()
        for key in range(d_key):
            if per_key:
                decay = factor(dt, rate, key)
            at = state + key * step
            updated = plus_scaled(scaled(load(at, lanes), decay), write, f32(keys)[key])
            store(updated, at, lanes)
            out = plus_scaled(out, updated, f32(queries)[key])
            if erases and not per_key:
                held = plus_scaled(held, updated, f32(following)[key])
        return out, held

    @inline
    def walk(op, context, sequence, head, key_head, at, matrix, skip, lanes):
        heads, key_heads = integer(op, 0), integer(op, 1)
        d_key, d_value = width(op, K) // key_heads, width(op, V) // heads
        first, end = first_row(context, sequence), first_row(context, sequence + 1)
        step, key_at = FLOAT * d_value, FLOAT * key_head * d_key
        rate = f32(address(op, context, A))[head] if present(op, A) else ONE
        dts = address(op, context, DT) + FLOAT * head * (d_key if per_key else 1)
        keys, held = address(op, context, K) + key_at + first * stride(op, K), nothing()
        if erases and not per_key and first < end:
            held = stored(matrix, step, keys, dts, rate, d_key, lanes)
        for row in range(first, end):
            dt = dts + row * stride(op, DT)
            queries = address(op, context, Q) + key_at + row * stride(op, Q)
            following = keys + stride(op, K) if row + 1 < end else keys
            value = load(address(op, context, V) + row * stride(op, V) + at, lanes)
            decay = ZERO if per_key else factor(dt, rate, 0)
            write = value
            if erases:
                if per_key:
                    held, decay_of_held = stored(matrix, step, keys, dt, rate, d_key, lanes), ONE
                else:
                    decay_of_held = decay
                write = less(value, scaled(held, decay_of_held))
            beta = f32(address(op, context, BETA) + row * stride(op, BETA))[head]
            out, held = update(
                matrix, step, keys, queries, following, dt, rate, decay, scaled(write, beta),
                d_key, lanes,
            )  # fmt: skip
            out = plus_scaled(out, value, skip)
            store(out, address(op, context, OUT) + row * stride(op, OUT) + at, lanes)
            keys = following

    return walk


def _recurrence(decay, erase):
    wide, narrow = _pass(decay, erase, WIDE), _pass(decay, erase, 1)

    @kernel(f"recurrence.{decay}_{erase}")
    def recurrence(op, context, thread, threads):
        heads, key_heads, mapping = integer(op, 0), integer(op, 1), integer(op, 2)
        d_key, d_value = width(op, K) // key_heads, width(op, V) // heads
        skips = address(op, context, D) if present(op, D) else 0
        columns = WIDE * LANES
        strips = (d_value + columns - 1) // columns
        block = claim(op, context)
        while block < sequences(context) * heads * strips:
            sequence, head = block // (heads * strips), block // strips % heads
            key_head = head // (heads // key_heads) if mapping == GROUPED else head % key_heads
            column = block % strips * columns
            at = FLOAT * (head * d_value + column)
            matrix = state(op, context, STATE, sequence) + FLOAT * (head * d_key * d_value + column)
            skip = f32(skips)[head] if skips != 0 else ZERO
            if column + columns <= d_value:
                wide(op, context, sequence, head, key_head, at, matrix, skip, LANES)
            else:
                while column < d_value:
                    lanes = min(LANES, d_value - column)
                    narrow(op, context, sequence, head, key_head, at, matrix, skip, lanes)
                    at, matrix = at + FLOAT * LANES, matrix + FLOAT * LANES
                    column += LANES
            block = claim(op, context)


for _decay in ("head", "key"):
    for _erase in ("none", "tied"):
        _recurrence(_decay, _erase)
