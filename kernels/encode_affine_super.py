"""Superblocks of blocks with a scale and an offset each, both whole multiples of shared ones.

A value is D s q - M m: D and M are halves, s and m whole numbers of a block, q one of the value.
Every block's best scale and offset are found first. Their scales decide D, then the offsets that
suit the rounded scales decide M. From then on everything is what is stored: every block tries the
neighbours of its s, each with the m that suits it, and D and M solve the least squares of the whole
superblock, for a few rounds of which the best counts.
"""

from __future__ import annotations

import numpy as np

from .encode_affine import fit, measure, put_codes
from .encode_lanes import HUGE, ONE, VECTOR, ZERO, between, larger, reciprocal, smaller
from .encode_shared import NEXT_M, NEXT_S, OFFSETS, VALUES, WEIGHTS, M, S, held, shared
from .intrinsics import fma, load, nearest, opaque, splat, store, where_less
from .jit import inline

_F = np.float32
SINGULAR = _F(1e-5)
#: Times that all s, m, D and M are found anew.
ROUNDS = 4


@inline
def begin_scales(x, w, plan, state, unit):
    """Every block's scale and offset, to VALUES and OFFSETS; returns D."""
    block_bytes = VECTOR * plan.size
    for j in range(opaque(plan.blocks)):
        x_j, w_j, at = x + block_bytes * j, w + block_bytes * j, state + VECTOR * j
        d, o, _ = fit(x_j, w_j, plan, unit)
        sums = measure(x_j, w_j, plan, d, o)
        store(at + VALUES, d)
        store(at + OFFSETS, o)
        # What an error of the scale costs.
        store(at + WEIGHTS, sums[4])
    return held(shared(state + VALUES, state + WEIGHTS, plan.blocks, ZERO, plan.most), unit)


@inline
def begin_offsets(x, w, plan, state, unit, scale):
    """Every block's s for D, and the offset that suits it; returns M."""
    block_bytes, inverse = VECTOR * plan.size, reciprocal(scale)
    for j in range(opaque(plan.blocks)):
        x_j, w_j, at = x + block_bytes * j, w + block_bytes * j, state + VECTOR * j
        s = between(nearest(load(at + VALUES) * inverse), ZERO, plan.most)
        o, total = load(at + OFFSETS), splat(ZERO)
        for i in range(opaque(plan.size)):
            total = total + load(w_j + VECTOR * i)
        for _ in range(opaque(2)):
            sums = measure(x_j, w_j, plan, scale * s, o)
            o = smaller(o + sums[1] * reciprocal(total), splat(ZERO))
        store(at + S, s)
        store(at + VALUES, splat(ZERO) - o)
        store(at + WEIGHTS, total)
    low = held(shared(state + VALUES, state + WEIGHTS, plan.blocks, ZERO, plan.most), unit)
    inverse = reciprocal(low)
    for at in range(state, state + VECTOR * opaque(plan.blocks), VECTOR):
        store(at + M, between(nearest(load(at + VALUES) * inverse), ZERO, plan.most))
    return low


@inline
def best_of_three(x, w, plan, total, scale, low, middle, before):
    """The best s of `middle` and its neighbours, its m, and what was measured with them."""
    zero, inverse, best = splat(ZERO), reciprocal(low), splat(HUGE)
    best_s, best_m, best_left, best_slope, best_linear, best_square = (
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
    )
    for turn in range(opaque(3)):
        s = between(middle + splat(_F(turn - 1)), ZERO, plan.most)
        _, left, _, _, _ = measure(x, w, plan, scale * s, zero - low * before)
        m = nearest(before - left * reciprocal(total) * inverse)
        m = between(m, ZERO, plan.most)
        error, left, slope, linear, square = measure(x, w, plan, scale * s, zero - low * m)
        best_s, best_m = where_less(error, best, s, best_s), where_less(error, best, m, best_m)
        best_left = where_less(error, best, left, best_left)
        best_slope = where_less(error, best, slope, best_slope)
        best_linear = where_less(error, best, linear, best_linear)
        best_square = where_less(error, best, square, best_square)
        best = smaller(error, best)
    return best_s, best_m, (best, best_left, best_slope, best_linear, best_square)


@inline
def step(x, w, plan, state, scale, low):
    """Every block's best s and m for D and M, to NEXT_S and NEXT_M; the error, the next D and M."""
    zero, block_bytes = splat(ZERO), VECTOR * plan.size
    # The least squares of x = D (s q) + M (-m): a matrix of a, b, b, c and the right side e, f.
    all_errors, a, b, c, e, f = zero, zero, zero, zero, zero, zero
    for j in range(opaque(plan.blocks)):
        at, total = state + VECTOR * j, load(state + VECTOR * j + WEIGHTS)
        s, m, sums = best_of_three(
            x + block_bytes * j, w + block_bytes * j, plan, total, scale, low,
            load(at + S), load(at + M),
        )  # fmt: skip
        error, left, slope, linear, square = sums
        store(at + NEXT_S, s)
        store(at + NEXT_M, m)
        all_errors = all_errors + error
        a, b, c = fma(s * s, square, a), b - s * m * linear, fma(m * m, total, c)
        e, f = fma(s, slope, e), f - m * left
    determinant = a * c - b * b
    sound = where_less(a * c * SINGULAR, determinant, splat(ONE), zero)
    inverse = reciprocal(determinant)
    d_step = where_less(zero, sound, (c * e - b * f) * inverse, e * reciprocal(a))
    m_step = where_less(zero, sound, (a * f - b * e) * inverse, zero)
    return all_errors, scale + d_step, larger(low + m_step, zero)


@inline
def encode_superblock(x, w, plan, state, unit):
    """Encode a tile of superblocks; returns D and M, and leaves s and m at S and M.

    x, w: addresses of the values and weights in lanes; x becomes q. state: that of STATE_FLOATS
    floats.
    """
    scale = begin_scales(x, w, plan, state, unit)
    low = begin_offsets(x, w, plan, state, unit, scale)
    best, best_scale, best_low = splat(HUGE), scale, low
    for _ in range(opaque(ROUNDS)):
        error, next_scale, next_low = step(x, w, plan, state, scale, low)
        for at in range(state, state + VECTOR * opaque(plan.blocks), VECTOR):
            store(at + S, where_less(error, best, load(at + NEXT_S), load(at + S)))
            store(at + M, where_less(error, best, load(at + NEXT_M), load(at + M)))
        best_scale = where_less(error, best, scale, best_scale)
        best_low = where_less(error, best, low, best_low)
        best = smaller(error, best)
        scale, low = held(next_scale, unit), held(next_low, unit)
    for j in range(opaque(plan.blocks)):
        d = best_scale * load(state + S + VECTOR * j)
        o = splat(ZERO) - best_low * load(state + M + VECTOR * j)
        put_codes(x + VECTOR * plan.size * j, plan, d, o)
    return best_scale, best_low
