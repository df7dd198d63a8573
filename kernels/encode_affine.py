"""Scale and offset of blocks whose values are d q + o, q a whole number from 0 to `top`.

What is minimised is the sum of w (x - d q - o)**2. For given q, the best d and o solve a small
system of least squares; for given d and o, the best q is the nearest. The two in turn come to a
place that neither can better, but not to the best one: so a search begins at several scales and
offsets. One pass over a block rounds, measures the error, and sums what the solution needs.
"""

from __future__ import annotations

import numpy as np

from .encode_lanes import HUGE, VECTOR, ZERO, between, larger, reciprocal, smaller
from .encode_shared import held
from .intrinsics import fma, load, nearest, opaque, splat, store, where_less
from .jit import inline

_F = np.float32
#: A system whose determinant is less than this, relative to its terms, has no solution.
SINGULAR = _F(1e-6)


def affine(top: int, free: bool):
    """Functions for whole numbers up to `top`; `free` offsets may be above 0.

    code(x, inverse, shift): the whole number nearest to x, where shift = -o / d.
    measure(x, w, count, d, o): the error, and the sums of w r, w r q, w q and w q q, r = x - d q - o.
    solve(total, d, o, *sums): the scale and offset that suit the same whole numbers best.
    """
    most = _F(top)

    @inline
    def code(x, inverse, shift):
        return between(nearest(fma(x, inverse, shift)), ZERO, most)

    @inline
    def measure(x, w, count, d, o):
        inverse = reciprocal(d)
        shift, zero = (splat(ZERO) - o) * inverse, splat(ZERO)
        error, left, slope, linear, square = zero, zero, zero, zero, zero
        for i in range(opaque(count)):
            value, weight = load(x + VECTOR * i), load(w + VECTOR * i)
            q = code(value, inverse, shift)
            rest = (value - o) - d * q
            weighed, counted = weight * rest, weight * q
            error, left = fma(weighed, rest, error), left + weighed
            slope = fma(weighed, q, slope)
            linear, square = linear + counted, fma(counted, q, square)
        return error, left, slope, linear, square

    @inline
    def solve(total, d, o, left, slope, linear, square):
        zero = splat(ZERO)
        determinant = total * square - linear * linear
        step = (total * slope - linear * left) * reciprocal(determinant)
        step = where_less(total * square * SINGULAR, determinant, step, zero)
        scale, offset = d + step, o + (left - linear * step) * reciprocal(total)
        if not free:
            alone = d + fma(o, linear, slope) * reciprocal(square)
            scale = where_less(zero, offset, alone, scale)
            offset = smaller(offset, zero)
        return scale, offset

    return code, measure, solve


def affine_fit(top: int, free: bool, halves: bool, starts: int, rounds: int, trim: float):
    """A function that finds the scale and offset of a block: fit(x, w, count, unit).

    It begins at the range of the values with 0 to `starts` - 1 times `trim` steps of the whole
    numbers taken off each end, and from there rounds and solves in turn. With `halves`, scale and
    offset are what halves can hold, in multiples of `unit`. Returns them and the sum of weights.
    """
    _, measure, solve = affine(top, free)
    share = _F(trim / top)

    @inline
    def fit(x, w, count, unit):
        low, highest, total = load(x), load(x), splat(ZERO)
        for i in range(opaque(count)):
            value = load(x + VECTOR * i)
            low, highest = smaller(low, value), larger(highest, value)
            total = total + load(w + VECTOR * i)
        if not free:
            low = smaller(low, splat(ZERO))
        span, best = highest - low, splat(HUGE)
        best_d, best_o = splat(ZERO), splat(ZERO)
        for start in range(opaque(starts * starts)):
            under, over = _F(start % starts) * share, _F(start // starts) * share
            d, o = span * ((_F(1) - under - over) * _F(1 / top)), fma(span, splat(under), low)
            for _ in range(opaque(rounds)):
                if halves:
                    d, o = held(d, unit), held(o, unit)
                error, left, slope, linear, square = measure(x, w, count, d, o)
                best_d = where_less(error, best, d, best_d)
                best_o = where_less(error, best, o, best_o)
                best = smaller(error, best)
                d, o = solve(total, d, o, left, slope, linear, square)
        return best_d, best_o, total

    return fit


def affine_block(top: int, count: int, starts: int, trim: float):
    """A function that encodes a tile of blocks with a scale and an offset: encode(x, w, state, unit).

    x, w: addresses of the values and weights in lanes; x becomes the whole numbers. Returns d and o.
    """
    code, _, _ = affine(top, True)
    fit = affine_fit(top, True, True, starts, 3, trim)

    @inline
    def encode(x, w, state, unit):
        d, o, _ = fit(x, w, count, unit)
        inverse = reciprocal(d)
        shift = (splat(ZERO) - o) * inverse
        for i in range(opaque(count)):
            store(x + VECTOR * i, code(load(x + VECTOR * i), inverse, shift))
        return d, o

    return encode
