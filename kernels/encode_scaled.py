"""Scale of blocks whose values are d c, c one of a few numbers: whole ones, or those of a table.

What is minimised is the sum of w (x - d c)**2. For given c, the best d is a quotient of two sums;
for given d, the best c is the nearest. The two in turn come to a place that neither can better, but
not to the best one: so a search begins at several scales of either sign, for the numbers reach
further on one side of 0.

In a superblock a value is D s c: D is a half, s a whole number of each block. The blocks' best
scales decide D. From then on everything is what is stored: every block tries the neighbours of its
s, and D solves the least squares of the superblock, for a few rounds of which the best counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .encode_codes import Codes
from .encode_lanes import HUGE, ONE, VECTOR, ZERO, between, larger, reciprocal, smaller
from .encode_shared import NEXT_S, VALUES, WEIGHTS, S, held, shared
from .intrinsics import absolute, fma, load, nearest, opaque, splat, store, where_less
from .jit import inline

_F = np.float32
#: Times that a search rounds and divides, from each of its beginnings.
FIT_ROUNDS = 4
#: Times that all s and D are found anew.
ROUNDS = 4


class Scaled(NamedTuple):
    """A format, and how it is searched for.

    size    values of a block
    lowest  the lowest c, and
    highest the highest one
    halves  whether a block's scale is a half of its own
    starts  scales of either sign that are tried: those at which the largest magnitude is so many
    first   times that of the lowest c, and from then on
    trim    so much more
    blocks  blocks of a superblock; their s are
    most    at most this below 0
    """

    size: int
    lowest: np.float32
    highest: np.float32
    halves: bool
    starts: int
    first: np.float32
    trim: np.float32
    blocks: int
    most: np.float32


class Encoders(NamedTuple):
    """Functions that encode a tile, for one kind of codes.

    x, w: addresses of the values and weights in lanes; x becomes the numbers of the codes. state:
    address of STATE_FLOATS floats. What halves hold is in multiples of `unit`.

    block(x, w, plan, unit): blocks with a scale of their own, which it returns.
    superblock(x, w, plan, state, unit): returns D, and leaves s at S.
    powers(x, w, plan, d, count): the best of d and the `count` - 1 powers of two above it.
    """

    block: Any
    superblock: Any
    powers: Any


def encoders(codes: Codes) -> Encoders:
    """Functions for codes of a kind; whole numbers of any range are one kind."""
    value, number = codes.value, codes.number

    @inline
    def measure(x, w, plan, d):
        """The error, and the sums of w r c and w c c, r what is left."""
        inverse = reciprocal(d)
        error, along, square = splat(ZERO), splat(ZERO), splat(ZERO)
        for i in range(opaque(plan.size)):
            one, weight = load(x + VECTOR * i), load(w + VECTOR * i)
            c = value(one * inverse, plan.lowest, plan.highest)
            rest = one - d * c
            weighed, counted = weight * rest, weight * c
            error, along = fma(weighed, rest, error), fma(weighed, c, along)
            square = fma(counted, c, square)
        return error, along, square

    @inline
    def put_codes(x, plan, d):
        inverse = reciprocal(d)
        for i in range(opaque(plan.size)):
            at = x + VECTOR * i
            store(at, number(load(at) * inverse, plan.lowest, plan.highest))

    @inline
    def fit(x, w, plan, unit):
        """The scale found for a block, and the sum of w c c."""
        peak, zero = splat(ZERO), splat(ZERO)
        for i in range(opaque(plan.size)):
            peak = larger(peak, absolute(load(x + VECTOR * i)))
        best, best_d, best_square = splat(HUGE), zero, zero
        for start in range(opaque(2 * plan.starts)):
            reach = plan.lowest * (plan.first + plan.trim * _F(start // 2))
            d = peak * (ONE / reach)
            if start % 2 == 1:
                d = zero - d
            for _ in range(opaque(FIT_ROUNDS)):
                if plan.halves:
                    d = held(d, unit)
                error, along, square = measure(x, w, plan, d)
                best_d = where_less(error, best, d, best_d)
                best_square = where_less(error, best, square, best_square)
                best = smaller(error, best)
                d = d + along * reciprocal(square)
        return best_d, best_square

    @inline
    def block(x, w, plan, unit):
        d, _ = fit(x, w, plan, unit)
        put_codes(x, plan, d)
        return d

    @inline
    def powers(x, w, plan, d, count):
        best, best_d = splat(HUGE), d
        for _ in range(opaque(count)):
            error, _, _ = measure(x, w, plan, d)
            best_d = where_less(error, best, d, best_d)
            best, d = smaller(error, best), d + d
        put_codes(x, plan, best_d)
        return best_d

    return Encoders(block, _superblock(measure, fit, put_codes), powers)


def _superblock(measure, fit, put_codes):
    @inline
    def begin(x, w, plan, state, unit):
        block_bytes = VECTOR * plan.size
        for j in range(opaque(plan.blocks)):
            d, square = fit(x + block_bytes * j, w + block_bytes * j, plan, unit)
            store(state + VALUES + VECTOR * j, d)
            store(state + WEIGHTS + VECTOR * j, square)
        low, high = ZERO - plan.most, plan.most - ONE
        scale = held(shared(state + VALUES, state + WEIGHTS, plan.blocks, low, high), unit)
        inverse = reciprocal(scale)
        for at in range(state, state + VECTOR * opaque(plan.blocks), VECTOR):
            store(at + S, between(nearest(load(at + VALUES) * inverse), low, high))
        return scale

    @inline
    def step(x, w, plan, state, scale):
        """Every block's best s for D, to NEXT_S; the error, and the next D."""
        total, slope, curve = splat(ZERO), splat(ZERO), splat(ZERO)
        for j in range(opaque(plan.blocks)):
            at, first = state + VECTOR * j, VECTOR * plan.size * j
            middle, best, best_s = load(at + S), splat(HUGE), splat(ZERO)
            best_along, best_square = splat(ZERO), splat(ZERO)
            for turn in range(opaque(3)):
                s = between(middle + splat(_F(turn - 1)), ZERO - plan.most, plan.most - ONE)
                error, along, square = measure(x + first, w + first, plan, scale * s)
                best_s = where_less(error, best, s, best_s)
                best_along = where_less(error, best, along, best_along)
                best_square = where_less(error, best, square, best_square)
                best = smaller(error, best)
            store(at + NEXT_S, best_s)
            total, slope = total + best, fma(best_s, best_along, slope)
            curve = fma(best_s * best_s, best_square, curve)
        return total, scale + slope * reciprocal(curve)

    @inline
    def superblock(x, w, plan, state, unit):
        scale = begin(x, w, plan, state, unit)
        best, best_scale = splat(HUGE), scale
        for _ in range(opaque(ROUNDS)):
            error, following = step(x, w, plan, state, scale)
            for at in range(state, state + VECTOR * opaque(plan.blocks), VECTOR):
                store(at + S, where_less(error, best, load(at + NEXT_S), load(at + S)))
            best_scale = where_less(error, best, scale, best_scale)
            best, scale = smaller(error, best), held(following, unit)
        for j in range(opaque(plan.blocks)):
            put_codes(x + VECTOR * plan.size * j, plan, best_scale * load(state + S + VECTOR * j))
        return best_scale

    return superblock
