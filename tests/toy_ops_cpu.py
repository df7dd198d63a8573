"""Naive kernels of `toy_ops.py`, and one that holds a forward up."""

from __future__ import annotations

import numpy as np

from keelback.kernels import table
from keelback.kernels.access import (
    address,
    claim,
    first_row,
    integer,
    number,
    page,
    position,
    rows,
    sequences,
    stride,
    width,
)
from keelback.kernels.elementary import exp, sigmoid
from keelback.kernels.intrinsics import (
    LANES,
    f32,
    fma,
    i64,
    load_first,
    max_lanes,
    splat,
    store_first,
    sum_lanes,
)
from keelback.kernels.jit import inline, kernel
from keelback.kernels.processor import atomic_load, call_kernel, pause

OUT, Q, K, V, KEYS, VALUES = range(6)
X, ROUTER, WEIGHT = 1, 2, 3
FLOAT = 4
ZERO = np.float32(0)
INFINITY = np.float32(np.inf)
CANCEL = table.CANCEL
#: Attributes of `toy_hold`: the kernel it stands in for, and where the flag lies that releases it.
REPLACED, RELEASE = table.MAX_ATTRIBUTES - 1, table.MAX_ATTRIBUTES - 2
#: A forgotten hold ends by itself after some seconds.
LONGEST_HOLD = 100_000_000


@inline
def dot(a, b, columns):
    """The sum of a[i] b[i]."""
    total = splat(ZERO)
    for column in range(0, columns, LANES):
        lanes = min(LANES, columns - column)
        left, right = a + FLOAT * column, b + FLOAT * column
        total = fma(load_first(left, lanes), load_first(right, lanes), total)
    return sum_lanes(total)


@inline
def copy(source, target, columns):
    for column in range(0, columns, LANES):
        lanes = min(LANES, columns - column)
        store_first(target + FLOAT * column, load_first(source + FLOAT * column, lanes), lanes)


@kernel("toy_attention")
def attention(op, context, thread, threads):
    """A block is a head of a sequence: it writes and reads columns that no other touches."""
    heads, scale = integer(op, 0), np.float32(number(op, 1))
    columns = width(op, OUT) // heads
    block = claim(op, context)
    while block < sequences(context) * heads:
        sequence, at = block // heads, FLOAT * columns * (block % heads)
        first, past = first_row(context, sequence), position(context, sequence)
        for row in range(first, first_row(context, sequence + 1)):
            token = past + row - first
            query = address(op, context, Q) + row * stride(op, Q) + at
            target = address(op, context, OUT) + row * stride(op, OUT) + at
            copy(
                address(op, context, K) + row * stride(op, K) + at,
                page(op, context, KEYS, sequence, token) + at,
                columns,
            )
            copy(
                address(op, context, V) + row * stride(op, V) + at,
                page(op, context, VALUES, sequence, token) + at,
                columns,
            )
            largest = -INFINITY
            for other in range(token + 1):
                key = page(op, context, KEYS, sequence, other) + at
                largest = max(largest, scale * dot(query, key, columns))
            for column in range(0, columns, LANES):
                lanes = min(LANES, columns - column)
                total, weights = splat(ZERO), splat(ZERO)
                for other in range(token + 1):
                    key = page(op, context, KEYS, sequence, other) + at
                    weight = exp(splat(scale * dot(query, key, columns) - largest))
                    value = page(op, context, VALUES, sequence, other) + at + FLOAT * column
                    total = fma(weight, load_first(value, lanes), total)
                    weights = weights + weight
                store_first(target + FLOAT * column, total / weights, lanes)
        block = claim(op, context)


@kernel("toy_experts")
def experts(op, context, thread, threads):
    """A block is a row. The next expert is the largest score behind the last one chosen."""
    used, choices = integer(op, 0), width(op, ROUTER)
    outputs, columns = width(op, OUT), width(op, X)
    row = claim(op, context)
    while row < rows(op, context):
        scores = f32(address(op, context, ROUTER) + row * stride(op, ROUTER))
        x = address(op, context, X) + row * stride(op, X)
        out = f32(address(op, context, OUT) + row * stride(op, OUT))
        for i in range(outputs):
            out[i] = ZERO
        chosen, score = -1, INFINITY
        for _ in range(used):
            best, highest = -1, -INFINITY
            for i in range(choices):
                behind = scores[i] < score or (scores[i] == score and i > chosen)
                if behind and (best < 0 or scores[i] > highest):
                    best, highest = i, scores[i]
            chosen, score = best, highest
            strength = max_lanes(sigmoid(splat(score)))
            matrix = address(op, context, WEIGHT) + chosen * outputs * stride(op, WEIGHT)
            for i in range(outputs):
                out[i] += strength * dot(matrix + i * stride(op, WEIGHT), x, columns)
        row = claim(op, context)


@kernel("toy_hold")
def hold(op, context, thread, threads):
    """Keep this thread until the call is cancelled or released; then run the kernel it replaced."""
    cancel, release = i64(context)[CANCEL], integer(op, RELEASE)
    spins = 0
    while atomic_load(cancel) == 0 and atomic_load(release) == 0 and spins < LONGEST_HOLD:
        spins += 1
        pause()
    if atomic_load(cancel) == 0:
        call_kernel(integer(op, REPLACED), op, context, thread, threads)
