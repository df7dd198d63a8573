"""Mixtures of experts: every row goes through a few matrices of a stack, chosen by a router.

A route, the choice for a row, is 2 * used float32: the numbers of the experts (whole, exact below
2^24), best first, then their strengths.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .linear import dequantize, weight_type
from .op import MATRIX, ROWS, Kind, Op, Operand, ShapeError, Weight, expect

_ROWS = Operand(Kind.ROWS, against="weight")
_PARTS = Operand(Kind.ROWS, against="weight", parts="used")


def route_shape(scores: Any, *, used: int) -> int:
    if not 0 < used <= scores.width:
        raise ShapeError(f"{used} experts cannot be chosen from {scores.width}")
    return 2 * used


def route(scores: np.ndarray, *, used: int) -> np.ndarray:
    """The `used` experts with the largest scores, and the softmax over those scores.

    scores: (T, experts). Ties go to the lowest number. Returns routes, (T, 2 * used).
    """
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :used]
    best = np.take_along_axis(scores, chosen, axis=1).astype(np.float64)
    strengths = np.exp(best - best[:, :1])
    strengths /= strengths.sum(axis=1, keepdims=True)
    return np.concatenate([chosen, strengths], axis=1).astype(np.float32)


def _check(routes: Any, weight: Weight, used: int, experts: int, *shape: int) -> None:
    expect(weight, experts, *shape)
    if routes.width != 2 * used:
        raise ShapeError(f"{weight.name}: routes of {routes.width} values do not name {used}")


def expert_linear_shape(
    x: Any, routes: Any, weight: Weight, *, width: int, used: int, experts: int
) -> int:
    _check(routes, weight, used, experts, width, x.width)
    return used * width


def expert_linear(
    x: np.ndarray, routes: np.ndarray, weight: np.ndarray, *, width: int, used: int, experts: int
) -> np.ndarray:
    """W_e x for each chosen expert e, side by side, best first.

    x: (T, K) float32, or what `quantize` makes of it where W is Q8_0. routes: (T, 2 * used).
    weight: (experts, width, K). Returns (T, used * width).
    """
    weight = weight.reshape(experts, width, -1)
    if x.shape[1] != weight.shape[2]:
        x = dequantize(x)
    chosen = routes[:, :used].astype(int)
    rows = [[weight[e] @ row for e in best] for row, best in zip(x, chosen, strict=True)]
    return np.array(rows, np.float32).reshape(len(x), used * width)


def expert_sum_shape(
    x: Any, routes: Any, weight: Weight, *, width: int, used: int, experts: int
) -> int:
    if x.width % used:
        raise ShapeError(f"{weight.name}: {x.width} values do not divide into {used} experts")
    _check(routes, weight, used, experts, width, x.width // used)
    return width


def expert_sum(
    x: np.ndarray, routes: np.ndarray, weight: np.ndarray, *, width: int, used: int, experts: int
) -> np.ndarray:
    """The sum of strength_e W_e x_e over the chosen experts, added up from the best one down.

    x: (T, used * K) float32, or what `quantize` makes of its parts. routes: (T, 2 * used). weight:
    (experts, width, K). Returns (T, width).
    """
    weight, out = weight.reshape(experts, width, -1), np.zeros((len(x), width), np.float32)
    parts = x.reshape(len(x) * used, -1)
    if parts.shape[1] != weight.shape[2]:
        parts = dequantize(parts)
    vectors = parts.reshape(len(x), used, -1)
    for t, choice in enumerate(routes):
        for rank in range(used):
            out[t] += choice[used + rank] * (weight[int(choice[rank])] @ vectors[t, rank])
    return out


OPS = (
    Op("route", {"scores": ROWS}, route_shape, route, ("used",)),
    Op(
        "expert_linear",
        {"x": _ROWS, "routes": ROWS, "weight": MATRIX},
        expert_linear_shape,
        expert_linear,
        ("width", "used"),
        weight_type,
    ),
    Op(
        "expert_sum",
        {"x": _PARTS, "routes": ROWS, "weight": MATRIX},
        expert_sum_shape,
        expert_sum,
        ("width", "used"),
        weight_type,
    ),
)
