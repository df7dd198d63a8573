"""Choosing the best of many scores, 16 at a time: what a router does for every row.

Numbers of what is chosen are never out of range, whatever the scores are, and never twice the same.
"""

from __future__ import annotations

import numpy as np

from .elementary import exp, sigmoid
from .intrinsics import (
    LANES,
    f32,
    lane_numbers,
    load,
    load_first,
    max_lanes,
    maximum,
    splat,
    store,
    store_first,
    sum_lanes,
    where_equal,
    where_less,
)
from .jit import inline

FLOAT = 4
ZERO, INFINITE = np.float32(0), np.float32(np.inf)
#: Of what nothing is worse, and of what has been chosen or must not be.
LOWEST, NEVER = np.float32(np.finfo(np.float32).min), np.float32(-np.inf)


@inline
def load_padded(address, lanes):
    """The first `lanes` lanes, the others smaller than anything."""
    return where_less(
        lane_numbers(), splat(np.float32(lanes)), load_first(address, lanes), splat(NEVER)
    )


@inline
def softmax(scores, target, count):
    """exp(score), over the sum of all of them."""
    most, total = splat(NEVER), splat(ZERO)
    for first in range(0, count, LANES):
        most = maximum(most, load_padded(scores + FLOAT * first, min(LANES, count - first)))
    most = splat(max_lanes(most))
    for first in range(0, count, LANES):
        at, lanes = FLOAT * first, min(LANES, count - first)
        store_first(target + at, exp(load_first(scores + at, lanes) - most), lanes)
        total = total + load_first(target + at, lanes)
    total = splat(sum_lanes(total))
    for first in range(0, count, LANES):
        at, lanes = target + FLOAT * first, min(LANES, count - first)
        store_first(at, load_first(at, lanes) / total, lanes)


@inline
def sigmoids(scores, target, count):
    """1 / (1 + exp(-score)), each by itself."""
    for first in range(0, count, LANES):
        at, lanes = FLOAT * first, min(LANES, count - first)
        store_first(target + at, sigmoid(load_first(scores + at, lanes)), lanes)


@inline
def copy_wanted(source, bias, target, count):
    """What is chosen by, plus a bias, without NaN: a number is found even among those."""
    for first in range(0, count, LANES):
        at, lanes = FLOAT * first, min(LANES, count - first)
        value = load_padded(source + at, lanes)
        if bias != 0:
            value = value + load_first(bias + at, lanes)
        lowest = where_less(lane_numbers(), splat(np.float32(lanes)), splat(LOWEST), splat(NEVER))
        store(target + at, where_less(lowest, value, value, lowest))


@inline
def best_two(values, count):
    """The sum of the two largest."""
    first, second = NEVER, NEVER
    for index in range(count):
        value = f32(values)[index]
        if value > first:
            first, second = value, first
        elif value > second:
            second = value
    return first + second


@inline
def keep_best_groups(wanted, sums, size, groups, kept):
    """Only experts of the `kept` groups whose best two add up to most are still wanted."""
    for group in range(groups):
        f32(sums)[group] = best_two(wanted + FLOAT * size * group, size)
    for group in range(groups):
        own, better = f32(sums)[group], 0
        for other in range(groups):
            value = f32(sums)[other]
            if value > own or (value == own and other < group):
                better += 1
        if better >= kept:
            for index in range(size):
                f32(wanted)[size * group + index] = NEVER


@inline
def best(wanted, count):
    """The number of the largest, the lowest of several; there are whole vectors of them."""
    most, at = load(wanted), lane_numbers()
    for first in range(LANES, count, LANES):
        value = load(wanted + FLOAT * first)
        at = where_less(most, value, lane_numbers() + np.float32(first), at)
        most = where_less(most, value, value, most)
    at = where_equal(most, splat(max_lanes(most)), at, splat(INFINITE))
    return np.int64(-max_lanes(splat(ZERO) - at))


@inline
def choose(wanted, strengths, count, used, out):
    """Write the numbers and strengths of the `used` best; returns the sum of the strengths."""
    total = ZERO
    for rank in range(used):
        expert = best(wanted, count)
        f32(wanted)[expert] = NEVER
        f32(out)[rank], f32(out)[used + rank] = np.float32(expert), f32(strengths)[expert]
        total += f32(strengths)[expert]
    return total
