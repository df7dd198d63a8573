"""What is added before a state is rounded down, so that on average nothing is lost: a dither.

Rounded to the nearest, what a token writes is lost wherever it is less than half a step, at every
token anew. With a fraction of a step added first, the same at every place on average, it counts as
often as it should. The fraction depends on the token's position and the place in the state alone:
the same text gives the same bits, however it arrived.

Within a token they are those of the R2 sequence (Roberts 2018), which spreads evenly over the rows
and 16 columns of a matrix, and then again over the next 16; from token to token and from head to
head it is moved by a hash (lowbias32, Ettinger 2018).
"""

from __future__ import annotations

import numpy as np

#: Columns that have fractions of their own.
LANES = 16
#: Steps of the fraction from a row and a column to the next, of 2**32.
ROW_STEP, COLUMN_STEP = 0xC13FA9A9, 0x91E10DA5
#: Between two heads, in what is hashed.
HEAD_STEP = 0x9E3779B9
MASK, HALF = 0xFFFFFFFF, 0x80000000


def start_of(position: int, head: int, dither: int) -> int:
    """The fraction of a matrix's first value behind a token, of 2**32.

    dither: -1, or 0 for one half everywhere, which is to round to the nearest.
    """
    x = (position + head * HEAD_STEP) & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return ((x ^ (x >> 16)) & dither) | (HALF & ~dither)


def fractions(position: int, shape: tuple[int, ...]) -> np.ndarray:
    """Fractions of all values of matrices, of 2**32: uint32 of `shape`, (..., K, V)."""
    *outer, rows, columns = shape
    heads = int(np.prod(outer))
    starts = np.array([start_of(position, head, -1) for head in range(heads)], np.uint64)
    places = np.arange(rows, dtype=np.uint64)[:, None] * ROW_STEP
    places = places + np.arange(columns, dtype=np.uint64) % LANES * COLUMN_STEP
    return (starts[:, None, None] + places).astype(np.uint32).reshape(shape)
