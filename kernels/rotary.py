"""Rotary positions: pairs of a head's values turned by angles that grow with the position."""

from __future__ import annotations

from typing import Any

import numpy as np

from .op import OPTIONAL_VECTOR, POSITIONS, ROWS, Op, ShapeError, Weight, expect


def halves(count: int) -> dict[str, int]:
    """Attributes of `rotary` for pairs (i, i + count / 2) of the first `count` values (NEOX)."""
    return {"count": count, "step": 1, "gap": count // 2}


def neighbours(count: int) -> dict[str, int]:
    """Attributes of `rotary` for pairs (2 i, 2 i + 1) of the first `count` values (NORM)."""
    return {"count": count, "step": 2, "gap": 1}


def _rotary_shape(
    x: Any,
    positions: Any,
    factors: Weight | None = None,
    *,
    heads: int,
    count: int,
    step: int,
    gap: int,
    ratio: float,
    first: int = 0,
    scale: float = 1.0,
    low: float = 0.0,
    high: float = 0.0,
    magnitude: float = 1.0,
) -> int:
    last = first + (count // 2 - 1) * step + gap
    if x.width % heads or count % 2 or count < 2 or not 0 <= first <= last < x.width // heads:
        raise ShapeError(f"{count} values of each of {heads} heads cannot be turned in {x.width}")
    expect(factors, count // 2)
    return x.width


def rotary(
    x: np.ndarray,
    positions: np.ndarray,
    factors: np.ndarray | None = None,
    *,
    heads: int,
    count: int,
    step: int,
    gap: int,
    ratio: float,
    first: int = 0,
    scale: float = 1.0,
    low: float = 0.0,
    high: float = 0.0,
    magnitude: float = 1.0,
) -> np.ndarray:
    """Turn pair i of every head, its values at first + i * step and gap behind, by its angle.

    The angle is position * ratio^i, over factors[i] where there are such. x: (T, heads * D).
    positions: (T,) int64. count: values of a head that are turned, the others stay. ratio:
    base^(-2 / count). factors: (count / 2,). For texts longer than those of training, pairs from
    `high` on turn `scale` times as fast, those up to `low` at their own speed, and those between
    change from one to the other; what is turned is then multiplied by `magnitude`. Returns
    (T, heads * D). Source: arXiv 2104.09864; YaRN, arXiv 2309.00071, section 3.
    """
    pairs = np.arange(count // 2)
    ramp = np.clip((pairs - low) / max(high - low, 1e-3), 0, 1)
    speeds = np.float64(ratio) ** pairs * (1 - ramp + ramp * scale)
    if factors is not None:
        speeds = speeds / factors.reshape(-1)
    angles = positions[:, None] * speeds
    cos, sin = (magnitude * part[:, None] for part in (np.cos(angles), np.sin(angles)))
    y = x.reshape(len(x), heads, -1).copy()
    one, other = first + pairs * step, first + pairs * step + gap
    y[..., one], y[..., other] = (
        y[..., one] * cos - y[..., other] * sin,
        y[..., one] * sin + y[..., other] * cos,
    )
    return y.reshape(x.shape)


OPS = (
    Op(
        "rotary",
        {"x": ROWS, "positions": POSITIONS, "factors": OPTIONAL_VECTOR},
        _rotary_shape,
        rotary,
        (
            "heads", "count", "step", "gap", "ratio", "first", "scale", "low", "high", "magnitude",
        ),
    ),
)  # fmt: skip
