"""exp, log and what is made of them, on 16 lanes: our own, so that bits are the same everywhere.

Constants are those of Cephes' single-precision functions (Moshier); errors stay below 2 ulp.
"""

from __future__ import annotations

import numpy as np

from .float_bits import exponent, mantissa, scale_by_power
from .intrinsics import fma, splat, where_equal, where_less
from .jit import inline

_F = np.float32
ONE, HALF, ZERO = _F(1), _F(0.5), _F(0)
LOG2_E = _F(1.44269504088896341)
LN2_HIGH, LN2_LOW = _F(0.693359375), _F(-2.12194440e-4)
EXP_LOWEST, EXP_HIGHEST = _F(-87.33), _F(88.37)
ROUNDER = _F(1.5 * 2**23)
SQRT_HALF = _F(0.707106781186547524)
SOFTPLUS_LINEAR = _F(20)

E0, E1, E2, E3, E4, E5 = (
    _F(value)
    for value in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        0.5,
    )
)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (
    _F(value)
    for value in (
        7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    )
)  # fmt: skip


@inline
def exp(x):
    """e**x; below -87.33 the smallest normal number's neighbourhood, above 88.37 a huge one."""
    return exp_down(where_less(splat(EXP_HIGHEST), x, splat(EXP_HIGHEST), x))


@inline
def exp_down(x):
    """e**x for decays, which do not come near 88.37."""
    # The comparison is false for NaN, which so passes through.
    x = where_less(x, splat(EXP_LOWEST), splat(EXP_LOWEST), x)
    # Added to 1.5 * 2**23, a number is rounded to a whole one that stands in the lowest bits.
    power = fma(x, splat(LOG2_E), splat(ROUNDER))
    whole = power - ROUNDER
    r = fma(whole, splat(-LN2_HIGH), x)
    r = fma(whole, splat(-LN2_LOW), r)
    p = fma(splat(E0), r, splat(E1))
    p = fma(p, r, splat(E2))
    p = fma(p, r, splat(E3))
    p = fma(p, r, splat(E4))
    p = fma(p, r, splat(E5))
    p = fma(p, r * r, r) + ONE
    return scale_by_power(p, power)


@inline
def log(x):
    """The natural logarithm of positive normal numbers."""
    m, e = mantissa(x), exponent(x)
    small = splat(SQRT_HALF)
    e = where_less(m, small, e - ONE, e)
    m = where_less(m, small, m + m, m) - ONE
    p = fma(splat(L0), m, splat(L1))
    p = fma(p, m, splat(L2))
    p = fma(p, m, splat(L3))
    p = fma(p, m, splat(L4))
    p = fma(p, m, splat(L5))
    p = fma(p, m, splat(L6))
    p = fma(p, m, splat(L7))
    p = fma(p, m, splat(L8))
    square = m * m
    p = fma(e, splat(LN2_LOW), p * m * square)
    p = fma(square, splat(-HALF), p) + m
    return fma(e, splat(LN2_HIGH), p)


@inline
def sigmoid(x):
    """1 / (1 + e**-x)."""
    return splat(ONE) / (exp(splat(ZERO) - x) + ONE)


@inline
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


@inline
def softplus(x):
    """log(1 + e**x), and x itself above 20 (torch's threshold)."""
    e = exp(where_less(splat(SOFTPLUS_LINEAR), x, splat(SOFTPLUS_LINEAR), x))
    # log(1 + e) loses e's low bits in the sum; e / ((1 + e) - 1) puts them back (Kahan).
    u = e + ONE
    lost = u - ONE
    small = where_equal(
        lost, splat(ZERO), e, log(u) * (e / where_equal(lost, splat(ZERO), splat(ONE), lost))
    )
    return where_less(splat(SOFTPLUS_LINEAR), x, x, small)
