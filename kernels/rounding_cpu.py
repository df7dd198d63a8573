"""What kernels that round blocks of 32 floats have in common: see `rounding.py`."""

from __future__ import annotations

import numpy as np

from .intrinsics import LANES, absolute, load, max_lanes, maximum, nearest
from .jit import inline

MOST, INVERSE, ZERO = np.float32(127), np.float32(1 / 127), np.float32(0)


@inline
def round_block(source):
    """The unit of 32 floats at an address, and their multiples of it, two vectors of 16."""
    low, high = load(source), load(source + 4 * LANES)
    largest = max_lanes(maximum(absolute(low), absolute(high)))
    inverse = MOST / largest if largest > ZERO else ZERO
    return largest * INVERSE, nearest(low * inverse), nearest(high * inverse)
