"""Scale and offset of blocks whose values are d q + o, q a whole number from 0 up.

What is minimised is the sum of w (x - d q - o)**2. For given q, the best d and o solve a small
system of least squares; for given d and o, the best q is the nearest. The two in turn come to a
place that neither can better, but not to the best one: so a search begins at several scales and
offsets. One pass over a block rounds, measures the error, and sums what the solution needs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .encode_lanes import HUGE, ONE, VECTOR, ZERO, between, larger, reciprocal, smaller
from .encode_shared import held
from .intrinsics import fma, load, nearest, opaque, splat, store, where_less
from .jit import inline

_F = np.float32
#: A system whose determinant is less than this, relative to its terms, has no solution.
SINGULAR = _F(1e-6)
#: Times that a search rounds and solves, from each of its beginnings.
ROUNDS = 6


class Affine(NamedTuple):
    """A format, and how it is searched for.

    size    values of a block
    top     the largest q
    free    whether offsets may be above 0
    halves  whether a block's scale and offset are halves of its own
    starts  how often the range is trimmed at each end, and
    trim    by how many steps of q each time
    blocks  blocks of a superblock, and
    most    the largest whole number that multiplies what they share
    """

    size: int
    top: np.float32
    free: bool
    halves: bool
    starts: int
    trim: np.float32
    blocks: int
    most: np.float32


@inline
def code(x, inverse, shift, top):
    """The q nearest to x, for inverse = 1 / d and shift = -o / d."""
    return between(nearest(fma(x, inverse, shift)), ZERO, top)


@inline
def measure(x, w, plan, d, o):
    """The error, and the sums of w r, w r q, w q and w q q, where r = x - d q - o."""
    inverse, zero = reciprocal(d), splat(ZERO)
    shift = (zero - o) * inverse
    error, left, slope, linear, square = zero, zero, zero, zero, zero
    for i in range(opaque(plan.size)):
        value, weight = load(x + VECTOR * i), load(w + VECTOR * i)
        q = code(value, inverse, shift, plan.top)
        rest = (value - o) - d * q
        weighed, counted = weight * rest, weight * q
        error, left = fma(weighed, rest, error), left + weighed
        slope = fma(weighed, q, slope)
        linear, square = linear + counted, fma(counted, q, square)
    return error, left, slope, linear, square


@inline
def solve(free, total, d, o, sums):
    """The scale and offset that suit the q best for which `sums` were measured with d and o."""
    _, left, slope, linear, square = sums
    zero, determinant = splat(ZERO), total * square - linear * linear
    step = (total * slope - linear * left) * reciprocal(determinant)
    step = where_less(total * square * SINGULAR, determinant, step, zero)
    scale, offset = d + step, o + (left - linear * step) * reciprocal(total)
    if not free:
        # Without an offset there is one sum to divide by another.
        alone = d + fma(o, linear, slope) * reciprocal(square)
        scale = where_less(zero, offset, alone, scale)
        offset = smaller(offset, zero)
    return scale, offset


@inline
def fit(x, w, plan, unit):
    """The scale and offset found for a block, and the sum of its weights.

    It begins at the range of the values, trimmed at each end, and from there rounds and solves in
    turn. What halves hold is in multiples of `unit`.
    """
    low, highest, total = load(x), load(x), splat(ZERO)
    for i in range(opaque(plan.size)):
        value = load(x + VECTOR * i)
        low, highest = smaller(low, value), larger(highest, value)
        total = total + load(w + VECTOR * i)
    if not plan.free:
        low = smaller(low, splat(ZERO))
    step, best = (highest - low) * (ONE / plan.top), splat(HUGE)
    best_d, best_o = splat(ZERO), splat(ZERO)
    for start in range(opaque(plan.starts * plan.starts)):
        under = _F(start % plan.starts) * plan.trim
        over = _F(start // plan.starts) * plan.trim
        d, o = step * (ONE - (under + over) / plan.top), fma(step, splat(under), low)
        for _ in range(opaque(ROUNDS)):
            if plan.halves:
                d, o = held(d, unit), held(o, unit)
            sums = measure(x, w, plan, d, o)
            best_d = where_less(sums[0], best, d, best_d)
            best_o = where_less(sums[0], best, o, best_o)
            best = smaller(sums[0], best)
            d, o = solve(plan.free, total, d, o, sums)
    return best_d, best_o, total


@inline
def put_codes(x, plan, d, o):
    """Replace a block's values by their q."""
    inverse = reciprocal(d)
    shift = (splat(ZERO) - o) * inverse
    for i in range(opaque(plan.size)):
        store(x + VECTOR * i, code(load(x + VECTOR * i), inverse, shift, plan.top))


@inline
def encode_block(x, w, plan, unit):
    """Encode a tile of blocks with a scale and an offset of their own, which it returns.

    x, w: addresses of the values and weights in lanes; x becomes q.
    """
    d, o, _ = fit(x, w, plan, unit)
    put_codes(x, plan, d, o)
    return d, o
