"""Scale of blocks whose values are d c, c one of a few numbers: whole ones, or those of a table.

What is minimised is the sum of w (x - d c)**2. For given c, the best d is a quotient of two sums;
for given d, the best c is the nearest. The two in turn come to a place that neither can better, but
not to the best one: so a search begins at several scales of either sign, for the numbers reach
further on one side of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .encode_lanes import HUGE, VECTOR, ZERO, between, larger, reciprocal, smaller
from .encode_shared import L, NEXT_L, VALUES, WEIGHTS, held, sharing
from .intrinsics import absolute, fma, load, nearest, opaque, splat, store, where_less
from .jit import inline
from .lane_bits import stairs

_F = np.float32


@dataclass(frozen=True)
class Codes:
    """The numbers c of a format.

    value(y): the one nearest to y. number(y): which one that is, counted from 0 up. reach: the
    magnitude of the lowest one.
    """

    value: Any
    number: Any
    reach: float


def whole(lowest: int, highest: int) -> Codes:
    """Whole numbers from `lowest` to `highest`."""
    low, high = _F(lowest), _F(highest)

    @inline
    def value(y):
        return between(nearest(y), low, high)

    @inline
    def number(y):
        return between(nearest(y), low, high) - low

    return Codes(value, number, -lowest)


def listed(table: Sequence[int]) -> Codes:
    """The numbers of a table that ascends."""
    values = np.array(table, np.float64)
    edges, heights = (values[1:] + values[:-1]) / 2, np.diff(values)
    climb, count = stairs(values[0], edges, heights), stairs(0.0, edges, np.ones(len(edges)))
    return Codes(climb, count, -values[0])


def signed(table: Sequence[int]) -> Codes:
    """The numbers of a table that ascends from 0, and their negatives; these come after it."""
    values = np.array(table, np.float64)
    edges, heights = (values[1:] + values[:-1]) / 2, np.diff(values)
    climb, count = stairs(0.0, edges, heights), stairs(0.0, edges, np.ones(len(edges)))
    least, negative = _F(edges[0]), _F(len(table))

    @inline
    def value(y):
        size = climb(absolute(y))
        return where_less(y, splat(ZERO), splat(ZERO) - size, size)

    @inline
    def number(y):
        size = count(absolute(y))
        return where_less(y, splat(-least), size + negative, size)

    return Codes(value, number, values[-1])


def _measure(codes: Codes):
    """measure(x, w, count, d): the error, and the sums of w r c and w c c, r what is left."""
    code = codes.value

    @inline
    def measure(x, w, count, d):
        inverse = reciprocal(d)
        error, along, square = splat(ZERO), splat(ZERO), splat(ZERO)
        for i in range(opaque(count)):
            value, weight = load(x + VECTOR * i), load(w + VECTOR * i)
            c = code(value * inverse)
            rest = value - d * c
            weighed, counted = weight * rest, weight * c
            error, along = fma(weighed, rest, error), fma(weighed, c, along)
            square = fma(counted, c, square)
        return error, along, square

    return measure


def scaled_fit(codes: Codes, halves: bool, starts: int, trim: float):
    """A function that finds the scale of a block: fit(x, w, count, unit).

    It begins where the largest magnitude meets the lowest number, and 1 to `starts` - 1 times
    `trim` of its magnitude beyond, but for a quarter of the starts that stay short of it. With
    `halves`, the scale is what a half can hold, in multiples of `unit`. Returns it and the sum of
    w c c.
    """
    measure, reach = _measure(codes), codes.reach
    first = reach * (1 - trim * (starts // 4))

    @inline
    def fit(x, w, count, unit):
        peak, zero = splat(ZERO), splat(ZERO)
        for i in range(opaque(count)):
            peak = larger(peak, absolute(load(x + VECTOR * i)))
        best, best_d, best_square = splat(HUGE), zero, zero
        for start in range(opaque(2 * starts)):
            d = peak * (_F(1) / (_F(first) + _F(trim * reach) * _F(start // 2)))
            if start % 2 == 1:
                d = zero - d
            for _ in range(opaque(3)):
                if halves:
                    d = held(d, unit)
                error, along, square = measure(x, w, count, d)
                best_d = where_less(error, best, d, best_d)
                best_square = where_less(error, best, square, best_square)
                best = smaller(error, best)
                d = d + along * reciprocal(square)
        return best_d, best_square

    return fit


def scaled_block(codes: Codes, count: int, starts: int, trim: float):
    """A function that encodes a tile of blocks with a scale each: encode(x, w, state, unit).

    x, w: addresses of the values and weights in lanes; x becomes the numbers' numbers. Returns d.
    """
    fit, number = scaled_fit(codes, True, starts, trim), codes.number

    @inline
    def encode(x, w, state, unit):
        d, _ = fit(x, w, count, unit)
        inverse = reciprocal(d)
        for i in range(opaque(count)):
            store(x + VECTOR * i, number(load(x + VECTOR * i) * inverse))
        return d

    return encode


def powers_block(codes: Codes, count: int, first: float, powers: int):
    """A function that encodes a tile of blocks whose scales are powers of two: encode(x, w).

    Of `first` and the `powers` - 1 powers of two above it, the scale with the least error is taken.
    x, w: addresses of the values and weights in lanes; x becomes the numbers' numbers. Returns d.
    """
    measure, number = _measure(codes), codes.number

    @inline
    def encode(x, w):
        d, best, best_d = splat(_F(first)), splat(HUGE), splat(ZERO)
        for _ in range(opaque(powers)):
            error, _, _ = measure(x, w, count, d)
            best_d = where_less(error, best, d, best_d)
            best, d = smaller(error, best), d + d
        inverse = reciprocal(best_d)
        for i in range(opaque(count)):
            store(x + VECTOR * i, number(load(x + VECTOR * i) * inverse))
        return best_d

    return encode


def scaled_superblock(
    codes: Codes, blocks: int, count: int, most: int, starts: int, rounds: int, trim: float
):
    """A function that encodes a tile of superblocks: encode(x, w, state, unit).

    A value is D l c: D is a half, l a whole number of each block from -`most` to `most` - 1. The
    blocks' best scales decide D. From then on everything is what is stored: every block tries the
    neighbours of its l, and D solves the least squares of the superblock, for `rounds` rounds of
    which the best counts. x, w: addresses of the values and weights in lanes; x becomes the
    numbers' numbers. state: address of STATE_FLOATS floats; l is left at L. Returns D.
    """
    measure, fit, number = _measure(codes), scaled_fit(codes, False, starts, trim), codes.number
    share, low, high = sharing(-most, most - 1), _F(-most), _F(most - 1)
    block_bytes = VECTOR * count

    @inline
    def begin(x, w, state, unit):
        for j in range(opaque(blocks)):
            d, square = fit(x + block_bytes * j, w + block_bytes * j, count, unit)
            store(state + VALUES + VECTOR * j, d)
            store(state + WEIGHTS + VECTOR * j, square)
        scale = held(share(state + VALUES, state + WEIGHTS, blocks), unit)
        inverse = reciprocal(scale)
        for j in range(opaque(blocks)):
            l = between(nearest(load(state + VALUES + VECTOR * j) * inverse), low, high)
            store(state + L + VECTOR * j, l)
        return scale

    @inline
    def step(x, w, state, scale):
        """Every block's best l for a D, to NEXT_L; the error, and the next D."""
        total, slope, curve = splat(ZERO), splat(ZERO), splat(ZERO)
        for j in range(opaque(blocks)):
            x_j, w_j, at = x + block_bytes * j, w + block_bytes * j, VECTOR * j
            middle, best, best_l = load(state + L + at), splat(HUGE), splat(ZERO)
            best_along, best_square = splat(ZERO), splat(ZERO)
            for turn in range(opaque(3)):
                l = between(middle + splat(_F(turn - 1)), low, high)
                error, along, square = measure(x_j, w_j, count, scale * l)
                best_l = where_less(error, best, l, best_l)
                best_along = where_less(error, best, along, best_along)
                best_square = where_less(error, best, square, best_square)
                best = smaller(error, best)
            store(state + NEXT_L + at, best_l)
            total, slope = total + best, fma(best_l, best_along, slope)
            curve = fma(best_l * best_l, best_square, curve)
        return total, scale + slope * reciprocal(curve)

    @inline
    def encode(x, w, state, unit):
        scale = begin(x, w, state, unit)
        best, best_scale = splat(HUGE), scale
        for _ in range(opaque(rounds)):
            error, following = step(x, w, state, scale)
            for j in range(opaque(blocks)):
                at = state + VECTOR * j
                l = where_less(error, best, load(at + NEXT_L), load(at + L))
                store(at + L, l)
            best_scale = where_less(error, best, scale, best_scale)
            best, scale = smaller(error, best), held(following, unit)
        for j in range(opaque(blocks)):
            inverse = reciprocal(best_scale * load(state + L + VECTOR * j))
            for i in range(opaque(count)):
                at = x + block_bytes * j + VECTOR * i
                store(at, number(load(at) * inverse))
        return best_scale

    return encode
