"""Scales of a superblock's blocks, rounded to whole multiples of one that they share."""

from __future__ import annotations

import numpy as np

from .encode_lanes import HUGE, ONE, VECTOR, ZERO, between, larger, reciprocal, smaller
from .intrinsics import absolute, fma, load, nearest, opaque, splat, where_equal, where_less
from .jit import inline
from .lane_bits import as_half

_F = np.float32
#: The least number above 0 that a half can hold, and the largest.
LEAST_HALF, LARGEST_HALF = _F(2.0**-24), _F(65504)
#: Scales that are tried, and how far the last one is from the first, in steps of the multiples.
TRIES, REACH = 24, _F(4)
#: Rows of a superblock's scratch memory, a vector for each of up to 16 blocks.
VALUES, OFFSETS, WEIGHTS, S, M, NEXT_S, NEXT_M = (VECTOR * 16 * row for row in range(7))
STATE_FLOATS = 7 * 16 * VECTOR // 4


@inline
def held(value, unit):
    """A positive or negative scale as a half holds it, in multiples of `unit`; 0 stays 0."""
    size = between(absolute(value) * unit, LEAST_HALF, LARGEST_HALF)
    half = as_half(size) * reciprocal(unit)
    half = where_less(value, splat(ZERO), splat(ZERO) - half, half)
    return where_equal(value, splat(ZERO), splat(ZERO), half)


@inline
def shared(values, weights, count, lowest, highest):
    """The scale D for which the sum of w (v - D s)**2 is least, s from `lowest` to `highest`.

    values, weights: addresses of `count` vectors. Where s may be negative, so may D, for the lowest
    number is one further from 0.
    """
    peak, best, found = splat(ZERO), splat(HUGE), splat(ZERO)
    for j in range(opaque(count)):
        peak = larger(peak, absolute(load(values + VECTOR * j)))
    signs = 2 if lowest < ZERO else 1
    for attempt in range(opaque(signs * TRIES)):
        steps = highest + REACH * (_F(attempt // signs) * _F(1 / TRIES) - _F(0.25))
        scale = peak * (ONE / steps)
        if attempt % signs == 1:
            scale = splat(ZERO) - scale
        for _ in range(opaque(2)):
            inverse = reciprocal(scale)
            error, along, square = splat(ZERO), splat(ZERO), splat(ZERO)
            for j in range(opaque(count)):
                value, weight = load(values + VECTOR * j), load(weights + VECTOR * j)
                s = between(nearest(value * inverse), lowest, highest)
                rest = value - scale * s
                error = fma(weight * rest, rest, error)
                along, square = fma(weight * rest, s, along), fma(weight * s, s, square)
            found = where_less(error, best, scale, found)
            best = smaller(error, best)
            scale = scale + along * reciprocal(square)
    return found
