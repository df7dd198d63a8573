"""Numba kernels of `attention.py`: threads take heads of rows.

The softmax is carried from tile to tile (arXiv 1805.02867): with every tile the sums so far are
scaled down to its largest score. A row goes through the same steps whatever came with it.
"""

from __future__ import annotations

import numpy as np

from .access import (
    address,
    claim,
    first_row,
    integer,
    number,
    page,
    position,
    rows,
    sequence_of,
    stride,
    width,
)
from .attention import TILE
from .elementary import exp
from .intrinsics import (
    LANES,
    f32,
    fma,
    load,
    load_first,
    max_lanes,
    maximum,
    splat,
    stack,
    store_first,
    sum_lanes,
)
from .jit import inline, kernel

OUT, X, CACHE = 0, 1, 2
Q, KEYS, VALUES = 1, 2, 3
FLOAT = 4
ZERO, INFINITY = np.float32(0), np.float32(np.inf)

tile_of_floats = stack(TILE)


@kernel("store")
def store(op, context, thread, threads):
    x, columns, count = address(op, context, X), width(op, X), rows(op, context)
    row = claim(op, context)
    while row < count:
        sequence = sequence_of(context, row)
        token = position(context, sequence) + row - first_row(context, sequence)
        source, target = x + row * stride(op, X), page(op, context, CACHE, sequence, token)
        for column in range(0, columns, LANES):
            lanes = min(LANES, columns - column)
            store_first(target + FLOAT * column, load_first(source + FLOAT * column, lanes), lanes)
        row = claim(op, context)


@inline
def dot(a, b, columns):
    """The sum of a[i] b[i]."""
    total = splat(ZERO)
    whole = columns // LANES * LANES
    for column in range(0, whole, LANES):
        total = fma(load(a + FLOAT * column), load(b + FLOAT * column), total)
    if whole < columns:
        lanes = columns - whole
        left, right = a + FLOAT * whole, b + FLOAT * whole
        total = fma(load_first(left, lanes), load_first(right, lanes), total)
    return sum_lanes(total)


@inline
def score(query, keys, step, columns, count, scale, scores):
    """The scores of a tile's first `count` keys, the others minus infinity; returns the largest."""
    for token in range(TILE):
        f32(scores)[token] = -INFINITY
    for token in range(count):
        f32(scores)[token] = scale * dot(query, keys + token * step, columns)
    largest = load(scores)
    for token in range(LANES, TILE, LANES):
        largest = maximum(largest, load(scores + FLOAT * token))
    return max_lanes(largest)


@inline
def weigh(scores, count, largest):
    """Replace scores by exp(score - largest); returns their sum."""
    total = splat(ZERO)
    for token in range(0, count, LANES):
        at, lanes = scores + FLOAT * token, min(LANES, count - token)
        store_first(at, exp(load(at) - largest), lanes)
        total = total + load_first(at, lanes)
    return sum_lanes(total)


@inline
def accumulate(weights, values, step, columns, count, kept, out):
    """out = kept * out + the weighted sum of a tile's values."""
    for column in range(0, columns, LANES):
        at, lanes = FLOAT * column, min(LANES, columns - column)
        total = load_first(out + at, lanes) * kept
        for token in range(count):
            value = load_first(values + token * step + at, lanes)
            total = fma(value, splat(f32(weights)[token]), total)
        store_first(out + at, total, lanes)


@inline
def divide(out, columns, divisor):
    for column in range(0, columns, LANES):
        at, lanes = out + FLOAT * column, min(LANES, columns - column)
        store_first(at, load_first(at, lanes) / splat(divisor), lanes)


@kernel("attention")
def attention(op, context, thread, threads):
    """A block is a head of a row."""
    heads, key_heads, scale = integer(op, 0), integer(op, 1), np.float32(number(op, 2))
    d_key, d_value = width(op, Q) // heads, width(op, OUT) // heads
    scores = tile_of_floats()
    block = claim(op, context)
    while block < rows(op, context) * heads:
        row, head = block // heads, block % heads
        key_head = head // (heads // key_heads)
        sequence = sequence_of(context, row)
        tokens = position(context, sequence) + row - first_row(context, sequence) + 1
        query = address(op, context, Q) + row * stride(op, Q) + FLOAT * d_key * head
        out = address(op, context, OUT) + row * stride(op, OUT) + FLOAT * d_value * head
        for column in range(0, d_value, LANES):
            store_first(out + FLOAT * column, splat(ZERO), min(LANES, d_value - column))
        largest, total = -INFINITY, ZERO
        for first in range(0, tokens, TILE):
            count = min(TILE, tokens - first)
            keys = page(op, context, KEYS, sequence, first) + FLOAT * d_key * key_head
            values = page(op, context, VALUES, sequence, first) + FLOAT * d_value * key_head
            highest = score(query, keys, stride(op, KEYS), d_key, count, scale, scores)
            # Not max(), which could lose a NaN.
            highest = max_lanes(maximum(splat(highest), splat(largest)))
            kept = max_lanes(exp(splat(largest - highest)))
            total = total * kept + weigh(scores, count, highest)
            accumulate(scores, values, stride(op, VALUES), d_value, count, kept, out)
            largest = highest
        divide(out, d_value, total)
        block = claim(op, context)
