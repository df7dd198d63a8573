"""What every encoder does around its search: 16 blocks into lanes, their weights, and out again.

A tile holds element i of 16 blocks as one vector, so a search is written for one block and done for
16 at once, every block in the same number of steps. Blocks do not see each other: what comes out
depends on a block's own values alone, whatever it shares a tile with.
"""

from __future__ import annotations

import numpy as np

from .intrinsics import LANES, absolute, f32, fma, i8, load, opaque, splat, store, where_less
from .jit import inline
from .lane_bits import floor, half_bits, power_below, root, store_low_bytes

VECTOR = 4 * LANES
_F = np.float32
ZERO, ONE = _F(0), _F(1)
#: Larger than any error.
HUGE = _F(3e38)
#: Below it, a block's values are left as small as they are.
LEAST = _F(2.0**-96)


@inline
def smaller(a, b):
    """The smaller of each lane; b where either is NaN."""
    return where_less(a, b, a, b)


@inline
def larger(a, b):
    """The larger of each lane; a where either is NaN."""
    return where_less(a, b, b, a)


@inline
def between(x, lowest, highest):
    """x, where it is within two float32, and else the nearer of them."""
    return smaller(larger(x, splat(lowest)), splat(highest))


@inline
def reciprocal(x):
    """1 / x, and 0 for what is as good as nothing."""
    return where_less(absolute(x), splat(_F(1e-30)), splat(ZERO), splat(ONE) / x)


@inline
def gather(source, target, elements, lanes):
    """`lanes` blocks of floats that follow each other, to lanes; those left over get zeros."""
    values, to = f32(source), f32(target)
    for lane in range(lanes):
        for i in range(opaque(elements)):
            to[LANES * i + lane] = values[elements * lane + i]
    for lane in range(lanes, LANES):
        for i in range(opaque(elements)):
            to[LANES * i + lane] = ZERO


@inline
def gather_columns(source, target, elements, lanes, first, blocks):
    """Likewise, of a row of `blocks` blocks that repeats, from its block `first`."""
    values, to = f32(source), f32(target)
    for lane in range(lanes):
        at = (first + lane) % blocks * elements
        for i in range(opaque(elements)):
            to[LANES * i + lane] = values[at + i]
    for lane in range(lanes, LANES):
        for i in range(opaque(elements)):
            to[LANES * i + lane] = ZERO


@inline
def all_ones(target, elements):
    """Weights of a block about whose columns nothing is known: vectors of ones."""
    for i in range(opaque(elements)):
        store(target + VECTOR * i, splat(ONE))


@inline
def scatter(source, target, nbytes, lanes):
    """Bytes in lanes, to `lanes` blocks that follow each other."""
    values, to = i8(source), i8(target)
    for lane in range(lanes):
        for i in range(opaque(nbytes)):
            to[nbytes * lane + i] = values[LANES * i + lane]


@inline
def normalize(x, elements):
    """Scale blocks by powers of two so that their largest magnitudes are between 1 and 2.

    Returns what they were divided by. So nothing overflows or is lost in between.
    """
    peak = splat(ZERO)
    for i in range(opaque(elements)):
        peak = larger(peak, absolute(load(x + VECTOR * i)))
    unit = power_below(larger(peak, splat(LEAST)))
    inverse = splat(ONE) / unit
    for i in range(opaque(elements)):
        store(x + VECTOR * i, load(x + VECTOR * i) * inverse)
    return unit


@inline
def weigh(x, weights, elements):
    """Multiply weights of columns by what an error of a value counts for its size.

    That is (8 x'**2 + x**2)**0.5, where x' is the root of the block's mean square: large values
    count somewhat more, and on trained models that was as good as anything between none of it and
    much more of it.
    """
    total = splat(ZERO)
    for i in range(opaque(elements)):
        value = load(x + VECTOR * i)
        total = fma(value, value, total)
    typical = total * _F(8 / elements)
    for i in range(opaque(elements)):
        value, at = load(x + VECTOR * i), weights + VECTOR * i
        store(at, load(at) * root(fma(value, value, typical)))


@inline
def high(value, parts):
    """Whole numbers divided by a power of two, rounded down."""
    return floor(value * _F(1 / parts))


@inline
def put_half(target, value):
    """Two rows of bytes: a half each."""
    bits = half_bits(value)
    store_low_bytes(target, bits)
    store_low_bytes(target + LANES, high(bits, 256))
