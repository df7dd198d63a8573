"""Numba kernels of `recurrence.py`: columns of S in lanes, so that a sum over keys has one order.

A strip of 16 columns of one head's state stays in the cache while all rows pass over it; the
columns of S never meet, so strips go to any thread.
"""

from __future__ import annotations

import numpy as np

from .access import address, claim, first_row, integer, present, sequences, state, stride, width
from .elementary import exp
from .intrinsics import LANES, f32, fma, load_first, splat, store_first
from .jit import inline, kernel
from .recurrence import GROUPED

OUT, Q, K, V, DT, BETA, STATE, A, D = range(9)
FLOAT = 4
ZERO = np.float32(0)


def _recurrence(decay, erase):
    per_key, erases = decay == "key", erase == "tied"

    @inline
    def factor(dt, rate, key):
        """The decay of row `key` of S: exp(A dt)."""
        return exp(splat(rate * f32(dt)[key if per_key else 0]))

    @inline
    def stored(state, step, keys, dt, rate, decay, d_key, lanes):
        """What the decayed state holds under the key: (D S)^T k."""
        total = splat(ZERO)
        for key in range(d_key):
            if per_key:
                decay = factor(dt, rate, key)
            total = fma(load_first(state + key * step, lanes) * decay, splat(keys[key]), total)
        return total

    @inline
    def update(state, step, keys, queries, dt, rate, decay, write, d_key, lanes):
        """S = D S + k u^T; returns S^T q."""
        total = splat(ZERO)
        for key in range(d_key):
            if per_key:
                decay = factor(dt, rate, key)
            updated = fma(splat(keys[key]), write, load_first(state + key * step, lanes) * decay)
            store_first(state + key * step, updated, lanes)
            total = fma(updated, splat(queries[key]), total)
        return total

    @kernel(f"recurrence.{decay}_{erase}")
    def recurrence(op, context, thread, threads):
        heads, key_heads, mapping = integer(op, 0), integer(op, 1), integer(op, 2)
        d_key, d_value = width(op, K) // key_heads, width(op, V) // heads
        out, q, k, v = (
            address(op, context, OUT),
            address(op, context, Q),
            address(op, context, K),
            address(op, context, V),
        )
        dts, betas, rates = (
            address(op, context, DT),
            address(op, context, BETA),
            f32(address(op, context, A)),
        )
        skips = address(op, context, D) if present(op, D) else 0
        strips, step = (d_value + LANES - 1) // LANES, FLOAT * d_value
        block = claim(op, context)
        while block < sequences(context) * heads * strips:
            sequence, head, strip = (
                block // (heads * strips),
                block // strips % heads,
                block % strips,
            )
            key_head = head // (heads // key_heads) if mapping == GROUPED else head % key_heads
            lanes, column = (
                min(LANES, d_value - LANES * strip),
                FLOAT * (head * d_value + LANES * strip),
            )
            matrix = state(op, context, STATE, sequence) + FLOAT * (
                head * d_key * d_value + LANES * strip
            )
            for row in range(first_row(context, sequence), first_row(context, sequence + 1)):
                keys = f32(k + row * stride(op, K) + FLOAT * key_head * d_key)
                queries = f32(q + row * stride(op, Q) + FLOAT * key_head * d_key)
                dt = dts + row * stride(op, DT) + FLOAT * head * (d_key if per_key else 1)
                value = load_first(v + row * stride(op, V) + column, lanes)
                decay = factor(dt, rates[head], 0)
                write = value
                if erases:
                    write = value - stored(matrix, step, keys, dt, rates[head], decay, d_key, lanes)
                write = write * f32(betas + row * stride(op, BETA))[head]
                total = update(
                    matrix, step, keys, queries, dt, rates[head], decay, write, d_key, lanes
                )
                if skips != 0:
                    total = fma(value, splat(f32(skips)[head]), total)
                store_first(out + row * stride(op, OUT) + column, total, lanes)
            block = claim(op, context)


for _decay in ("head", "key"):
    for _erase in ("none", "tied"):
        _recurrence(_decay, _erase)
