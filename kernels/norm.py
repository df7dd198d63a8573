"""Normalisations of rows, whole or in groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from .op import OPTIONAL_ROWS, OPTIONAL_VECTOR, ROWS, Op, ShapeError, Weight

#: Orders of the output gate of `rms_norm`.
GATE_FIRST, NORM_FIRST = 1, 2


def _rms_norm_shape(
    x: Any,
    weight: Weight | None = None,
    gate: Any = None,
    *,
    eps: float,
    groups: int = 1,
    order: int = 0,
) -> int:
    if (order == 0) != (gate is None):
        raise ShapeError("a gate needs an order, and an order a gate")
    if x.width % groups or (gate is not None and gate.width != x.width):
        raise ShapeError(f"a row of {x.width} values cannot be normalised in {groups} groups")
    if weight is not None and weight.size not in (x.width, x.width // groups):
        raise ShapeError(
            f"tensor {weight.name} has the shape {list(weight.shape)} where [{x.width}] is needed"
        )
    return x.width


def rms_norm(
    x: np.ndarray,
    weight: np.ndarray | None = None,
    gate: np.ndarray | None = None,
    *,
    eps: float,
    groups: int = 1,
    order: int = 0,
) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * w over each of `groups` equal parts of a row.

    x, gate: (T, D). weight: (D,), or (D / groups,) used by every group, or none. With GATE_FIRST
    x * silu(gate) is normalised (Mamba-2, arXiv 2405.21060), with NORM_FIRST the normalised row is
    multiplied by silu(gate) (Gated DeltaNet, arXiv 2412.06464). Returns (T, D).
    """
    silu = None if gate is None else gate / (1 + np.exp(-gate))
    if order == GATE_FIRST:
        x = x * silu
    parts = x.reshape(len(x), groups, x.shape[1] // groups)
    mean = np.mean(np.square(parts, dtype=np.float64), axis=2, keepdims=True)
    y = parts / np.sqrt(mean + eps)
    if weight is not None:
        y = y * weight.reshape(-1, parts.shape[2])
    y = y.reshape(x.shape).astype(np.float32)
    return y * silu if order == NORM_FIRST else y


def _l2_norm_shape(x: Any, *, eps: float, groups: int, scale: float = 1.0) -> int:
    if x.width % groups:
        raise ShapeError(f"a row of {x.width} values cannot be normalised in {groups} groups")
    return x.width


def l2_norm(x: np.ndarray, *, eps: float, groups: int, scale: float = 1.0) -> np.ndarray:
    """scale * x / sqrt(sum(x^2) + eps) over each of `groups` equal parts of a row.

    x: (T, D). Returns (T, D). Source: the queries and keys of Gated DeltaNet, arXiv 2412.06464.
    """
    parts = x.reshape(len(x), groups, x.shape[1] // groups)
    total = np.sum(np.square(parts, dtype=np.float64), axis=2, keepdims=True)
    return (parts / np.sqrt(total + eps) * scale).reshape(x.shape).astype(np.float32)


OPS = (
    Op(
        "rms_norm",
        {"x": ROWS, "weight": OPTIONAL_VECTOR, "gate": OPTIONAL_ROWS},
        _rms_norm_shape,
        rms_norm,
        ("eps", "groups", "order"),
    ),
    Op("l2_norm", {"x": ROWS}, _l2_norm_shape, l2_norm, ("eps", "groups", "scale")),
)
