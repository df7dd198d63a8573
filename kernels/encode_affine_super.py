"""Superblocks of blocks with a scale and an offset each, both whole multiples of shared ones.

A value is D l q - M m: D and M are halves, l and m whole numbers of each block, q one of each value.
Every block's best scale and offset are found first. Their scales decide D, then the offsets that
suit the rounded scales decide M. From then on everything is what is stored: every block tries the
neighbours of its l, each with the m that suits it, and D and M solve the least squares of the whole
superblock, for a few rounds of which the best counts.
"""

from __future__ import annotations

import numpy as np

from .encode_affine import affine, affine_fit
from .encode_lanes import HUGE, VECTOR, ZERO, between, larger, reciprocal, smaller
from .encode_shared import L, M, NEXT_L, NEXT_M, OFFSETS, VALUES, WEIGHTS, held, sharing
from .intrinsics import fma, load, nearest, opaque, splat, store, where_less
from .jit import inline

_F = np.float32


def superblock(blocks: int, count: int, top: int, most: int, starts: int, rounds: int, trim: float):
    """A function that encodes a tile of superblocks: encode(x, w, state, unit).

    x, w: addresses of the values and weights in lanes; x becomes the whole numbers q. state: address
    of STATE_FLOATS floats, in which l and m are left at L and M. Returns D and M.
    """
    code, measure, solve = affine(top, free=False)
    fit = affine_fit(top, False, False, starts, 3, trim)
    share, limit, block_bytes = sharing(0, most), _F(most), VECTOR * count

    @inline
    def begin(x, w, state, unit):
        """D, M, and whole numbers l to begin with."""
        for j in range(opaque(blocks)):
            x_j, w_j = x + block_bytes * j, w + block_bytes * j
            d, o, total = fit(x_j, w_j, count, unit)
            _, _, _, linear, square = measure(x_j, w_j, count, d, o)
            store(state + VALUES + VECTOR * j, d)
            store(state + OFFSETS + VECTOR * j, o)
            # What an error of the scale costs if the offset makes the best of it.
            store(state + WEIGHTS + VECTOR * j, square - linear * linear * reciprocal(total))
        scale = held(share(state + VALUES, state + WEIGHTS, blocks), unit)
        inverse = reciprocal(scale)
        for j in range(opaque(blocks)):
            x_j, w_j, at = x + block_bytes * j, w + block_bytes * j, VECTOR * j
            l = between(nearest(load(state + VALUES + at) * inverse), ZERO, limit)
            o, total = load(state + OFFSETS + at), splat(ZERO)
            for i in range(opaque(count)):
                total = total + load(w_j + VECTOR * i)
            for _ in range(opaque(2)):
                _, left, _, _, _ = measure(x_j, w_j, count, scale * l, o)
                o = smaller(o + left * reciprocal(total), splat(ZERO))
            store(state + L + at, l)
            store(state + VALUES + at, splat(ZERO) - o)
            store(state + WEIGHTS + at, total)
        return scale, held(share(state + VALUES, state + WEIGHTS, blocks), unit)

    @inline
    def step(x, w, state, scale, low):
        """Every block's best l and m for a D and M, to NEXT_L and NEXT_M, and the next D and M."""
        zero = splat(ZERO)
        sum_error, a, b, c, e, f = zero, zero, zero, zero, zero, zero
        inverse = reciprocal(low)
        for j in range(opaque(blocks)):
            x_j, w_j, at = x + block_bytes * j, w + block_bytes * j, VECTOR * j
            total, best = load(state + WEIGHTS + at), splat(HUGE)
            middle, before = load(state + L + at), load(state + M + at)
            best_l, best_m, best_left = zero, zero, zero
            best_slope, best_linear, best_square = zero, zero, zero
            for turn in range(opaque(3)):
                l = between(middle + splat(_F(turn - 1)), ZERO, limit)
                _, left, _, _, _ = measure(x_j, w_j, count, scale * l, zero - low * before)
                m = before - left * reciprocal(total) * inverse
                m = between(nearest(m), ZERO, limit)
                error, left, slope, linear, square = measure(
                    x_j, w_j, count, scale * l, zero - low * m
                )
                best_l, best_m = (
                    where_less(error, best, l, best_l),
                    where_less(error, best, m, best_m),
                )
                best_left = where_less(error, best, left, best_left)
                best_slope = where_less(error, best, slope, best_slope)
                best_linear = where_less(error, best, linear, best_linear)
                best_square = where_less(error, best, square, best_square)
                best = smaller(error, best)
            store(state + NEXT_L + at, best_l)
            store(state + NEXT_M + at, best_m)
            sum_error = sum_error + best
            # Least squares of x = D (l q) + M (-m).
            a = fma(best_l * best_l, best_square, a)
            b = fma(best_l * best_m, zero - best_linear, b)
            c = fma(best_m * best_m, total, c)
            e, f = fma(best_l, best_slope, e), fma(best_m, zero - best_left, f)
        determinant = reciprocal(a * c - b * b)
        alone = where_less(a * c - b * b, a * c * _F(1e-5), splat(_F(1)), zero)
        d_step = where_less(zero, alone, e * reciprocal(a), (c * e - b * f) * determinant)
        m_step = where_less(zero, alone, zero, (a * f - b * e) * determinant)
        return sum_error, scale + d_step, larger(low + m_step, zero)

    @inline
    def encode(x, w, state, unit):
        scale, low = begin(x, w, state, unit)
        inverse = reciprocal(low)
        for j in range(opaque(blocks)):
            at = VECTOR * j
            store(
                state + M + at, between(nearest(load(state + VALUES + at) * inverse), ZERO, limit)
            )
        best, best_scale, best_low = splat(HUGE), scale, low
        for _ in range(opaque(rounds)):
            error, next_scale, next_low = step(x, w, state, scale, low)
            for at in range(0, VECTOR * opaque(blocks), VECTOR):
                l, m = load(state + NEXT_L + at), load(state + NEXT_M + at)
                store(state + L + at, where_less(error, best, l, load(state + L + at)))
                store(state + M + at, where_less(error, best, m, load(state + M + at)))
            best_scale = where_less(error, best, scale, best_scale)
            best_low = where_less(error, best, low, best_low)
            best = smaller(error, best)
            scale, low = held(next_scale, unit), held(next_low, unit)
        for j in range(opaque(blocks)):
            d = best_scale * load(state + L + VECTOR * j)
            o = splat(ZERO) - best_low * load(state + M + VECTOR * j)
            inverse = reciprocal(d)
            shift = (splat(ZERO) - o) * inverse
            for i in range(opaque(count)):
                at = x + block_bytes * j + VECTOR * i
                store(at, code(load(at), inverse, shift))
        return best_scale, best_low

    return encode
