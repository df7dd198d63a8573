"""Columns of every part of a row, taken out and put side by side: fused projections by head."""

from __future__ import annotations

from typing import Any

import numpy as np

from .op import ROWS, Op, ShapeError


def _columns_shape(x: Any, *, groups: int, start: int, width: int) -> int:
    if x.width % groups or not 0 <= start < start + width <= x.width // groups:
        raise ShapeError(
            f"columns {start} to {start + width} cannot be taken from {groups} parts of a row of "
            f"{x.width} values"
        )
    return groups * width


def columns(x: np.ndarray, *, groups: int, start: int, width: int) -> np.ndarray:
    """Of each of `groups` equal parts of a row, the columns `start` to `start + width`.

    x: (T, D). Returns (T, groups * width).
    """
    parts = x.reshape(len(x), groups, -1)
    return parts[:, :, start : start + width].reshape(len(x), groups * width)


def _join_shape(x: Any, y: Any, *, groups: int) -> int:
    if x.width % groups or y.width % groups:
        raise ShapeError(f"rows of {x.width} and {y.width} values do not divide into {groups}")
    return x.width + y.width


def join(x: np.ndarray, y: np.ndarray, *, groups: int) -> np.ndarray:
    """The parts of two rows in turn: x_1 y_1 x_2 y_2 ...

    x: (T, groups * D). y: (T, groups * E). Returns (T, groups * (D + E)).
    """
    both = [part.reshape(len(x), groups, -1) for part in (x, y)]
    return np.concatenate(both, axis=2).reshape(len(x), x.shape[1] + y.shape[1])


OPS = (
    Op("columns", {"x": ROWS}, _columns_shape, columns, ("groups", "start", "width")),
    Op("join", {"x": ROWS, "y": ROWS}, _join_shape, join, ("groups",)),
)
