"""A tile of tokens: queries of one row meet 64 keys and their values, in grids."""

from __future__ import annotations

import numpy as np

from .access import stride
from .attention import QUERIES, TILE
from .elementary import exp
from .grids import CELLS, load_scaled, products, store_grid, store_sums, weighted
from .intrinsics import LANES, f32, fetch, load, max_lanes, maximum, splat, store, sum_lanes
from .jit import outlined, stand_alone
from .strips import first_lane
from .tiles import zeros

KEYS, VALUES = 2, 3
FLOAT = 4
ZERO, INFINITY = np.float32(0), np.float32(np.inf)
#: Vectors of values that a grid of queries meets at once.
ABREAST = 4
#: Vectors of keys, or tokens, between two requests for what comes next. Requests are few and often,
#: for a processor that is asked for some kilobytes at once forgets most of them.
AT_ONCE = 4
#: What a thread keeps of each of its queries: the largest score and the sum of weights of a span,
#: what the last tile has scaled them by, and the same of all spans so far.
LARGEST, TOTAL, KEPT, WHOLE_LARGEST, WHOLE_TOTAL = range(5)


@outlined
def weigh(scores, low, high, stats, query):
    """Replace scores by exp(score - largest) and carry the largest and the sum of a query on."""
    stand_alone()
    for token in range(low):
        f32(scores)[token] = -INFINITY
    for token in range(high, TILE):
        f32(scores)[token] = -INFINITY
    best = maximum(load(scores), load(scores + FLOAT * LANES))
    best = maximum(best, load(scores + FLOAT * 2 * LANES))
    best = maximum(best, load(scores + FLOAT * 3 * LANES))
    before = f32(stats)[LARGEST * QUERIES + query]
    # Not max(), which could lose a NaN.
    largest = max_lanes(maximum(best, splat(before)))
    total = splat(ZERO)
    for token in range(0, TILE, LANES):
        at = scores + FLOAT * token
        value = exp(load(at) - largest)
        store(at, value)
        if low == 0 and high == TILE:
            total = total + value
    if low != 0 or high != TILE:
        # exp does not come down to zero.
        for token in range(low):
            f32(scores)[token] = ZERO
        for token in range(high, TILE):
            f32(scores)[token] = ZERO
        for token in range(0, TILE, LANES):
            total = total + load(scores + FLOAT * token)
    kept = first_lane(exp(splat(before - largest)))
    f32(stats)[KEPT * QUERIES + query] = kept
    f32(stats)[TOTAL * QUERIES + query] = f32(stats)[TOTAL * QUERIES + query] * kept + sum_lanes(
        total
    )
    f32(stats)[LARGEST * QUERIES + query] = largest


def tile_of(key_kind, value_kind, queries):
    """A function: `queries` queries of one row against the tokens low to high of a tile.

    Values are asked for while keys are read, and the next tile's keys, `after`, while values are.
    """
    together = CELLS // queries
    meet, put, nothing = products(key_kind, queries), store_sums(queries), zeros(CELLS)
    many, one = weighted(value_kind, queries, ABREAST), weighted(value_kind, queries, 1)
    load_many, load_one = load_scaled(queries, ABREAST), load_scaled(queries, 1)
    store_many, store_one = store_grid(queries, ABREAST), store_grid(queries, 1)

    @outlined
    def tile(op, scores, stats, query, q, out, d_key, d_value, keys, values, low, high, after):
        stand_alone()
        q_step, out_step = FLOAT * d_key, FLOAT * d_value
        key_step, value_step = stride(op, KEYS), stride(op, VALUES)
        for token in range(low // together * together, high, together):
            at, total = keys + token * key_step, nothing()
            ahead, share = values + token * value_step, together * value_step // (d_key // LANES)
            index = 0
            while index + AT_ONCE <= d_key // LANES:
                fetch(ahead + index * share, AT_ONCE * share)
                for part in range(AT_ONCE):
                    total = meet(total, q, q_step, at, key_step, index + part)
                index += AT_ONCE
            while index < d_key // LANES:
                fetch(ahead + index * share, share)
                total = meet(total, q, q_step, at, key_step, index)
                index += 1
            put(total, scores + FLOAT * token, FLOAT * TILE)
        for i in range(queries):
            weigh(scores + FLOAT * TILE * i, low, high, stats, query + i)
        kept, vectors = stats + FLOAT * (KEPT * QUERIES + query), d_value // LANES
        index = 0
        while index + ABREAST <= vectors:
            at = out + FLOAT * LANES * index
            share = key_step * ABREAST // vectors
            ahead = after + index // ABREAST * TILE * share
            total = load_many(at, out_step, kept)
            for start in range(low, high, AT_ONCE):
                fetch(ahead + start * share, AT_ONCE * share)
                for token in range(start, min(start + AT_ONCE, high)):
                    weights, row = scores + FLOAT * token, values + token * value_step
                    total = many(total, weights, FLOAT * TILE, row, index)
            store_many(total, at, out_step)
            index += ABREAST
        while index < vectors:
            at = out + FLOAT * LANES * index
            rest = load_one(at, out_step, kept)
            for token in range(low, high):
                weights, row = scores + FLOAT * token, values + token * value_step
                rest = one(rest, weights, FLOAT * TILE, row, index)
            store_one(rest, at, out_step)
            index += 1

    return tile
