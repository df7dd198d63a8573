"""Rotary positions: pairs of a head's values turned by angles that grow with the position."""

from __future__ import annotations

from typing import Any

import numpy as np

from .op import POSITIONS, ROWS, Op, ShapeError


def halves(count: int) -> dict[str, int]:
    """Attributes of `rotary` for pairs (i, i + count / 2) of the first `count` values (NEOX)."""
    return {"count": count, "step": 1, "gap": count // 2}


def neighbours(count: int) -> dict[str, int]:
    """Attributes of `rotary` for pairs (2 i, 2 i + 1) of the first `count` values (NORM)."""
    return {"count": count, "step": 2, "gap": 1}


def rotary_shape(
    x: Any, positions: Any, *, heads: int, count: int, step: int, gap: int, ratio: float
) -> int:
    last = (count // 2 - 1) * step + gap
    if x.width % heads or count % 2 or count < 2 or last >= x.width // heads:
        raise ShapeError(f"{count} values of each of {heads} heads cannot be turned in {x.width}")
    return x.width


def rotary(
    x: np.ndarray,
    positions: np.ndarray,
    *,
    heads: int,
    count: int,
    step: int,
    gap: int,
    ratio: float,
) -> np.ndarray:
    """Turn pair i of every head, its values at i * step and i * step + gap, by position * ratio^i.

    x: (T, heads * D). positions: (T,) int64. count: values of a head that are turned, the others
    stay. ratio: base^(-2 / count). Returns (T, heads * D). Source: arXiv 2104.09864.
    """
    pairs = np.arange(count // 2)
    angles = positions[:, None] * np.float64(ratio) ** pairs
    cos, sin = (part.astype(np.float32)[:, None] for part in (np.cos(angles), np.sin(angles)))
    y = x.reshape(len(x), heads, -1).copy()
    first, second = y[..., pairs * step], y[..., pairs * step + gap]
    y[..., pairs * step] = first * cos - second * sin
    y[..., pairs * step + gap] = first * sin + second * cos
    return y.reshape(x.shape)


OPS = (
    Op(
        "rotary",
        {"x": ROWS, "positions": POSITIONS},
        rotary_shape,
        rotary,
        ("heads", "count", "step", "gap", "ratio"),
    ),
)
