"""The numbers that scales multiply: whole ones of a range, or those of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .encode_lanes import ZERO, between
from .intrinsics import absolute, nearest, splat, where_less
from .jit import inline
from .lane_bits import stairs

_F = np.float32


@dataclass(frozen=True)
class Codes:
    """A kind of numbers, from `lowest` to `highest`, which a table knows without being told.

    value(y, lowest, highest): the number nearest to y. number(y, lowest, highest): which one that
    is, counted from 0 up.
    """

    value: Any
    number: Any


def whole() -> Codes:
    """Whole numbers."""

    @inline
    def value(y, lowest, highest):
        return between(nearest(y), lowest, highest)

    @inline
    def number(y, lowest, highest):
        return between(nearest(y), lowest, highest) - lowest

    return Codes(value, number)


def _steps(table: Sequence[int]) -> tuple[list[float], list[float]]:
    """Where one number of a table gives way to the next, and how far apart they are."""
    pairs = list(pairwise(table))
    return [(low + high) / 2 for low, high in pairs], [float(high - low) for low, high in pairs]


def listed(table: Sequence[int]) -> Codes:
    """The numbers of a table that ascends."""
    edges, heights = _steps(table)
    climb, count = stairs(table[0], edges, heights), stairs(0, edges, [1.0] * len(edges))

    @inline
    def value(y, lowest, highest):
        return climb(y)

    @inline
    def number(y, lowest, highest):
        return count(y)

    return Codes(value, number)


def signed(table: Sequence[int]) -> Codes:
    """The numbers of a table that ascends from 0, and their negatives, which come after them."""
    edges, heights = _steps(table)
    climb, count = stairs(0, edges, heights), stairs(0, edges, [1.0] * len(edges))
    least, negative = _F(edges[0]), _F(len(table))

    @inline
    def value(y, lowest, highest):
        size = climb(absolute(y))
        return where_less(y, splat(ZERO), splat(ZERO) - size, size)

    @inline
    def number(y, lowest, highest):
        size = count(absolute(y))
        return where_less(y, splat(-least), size + negative, size)

    return Codes(value, number)
