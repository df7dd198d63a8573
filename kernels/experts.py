"""Mixtures of experts: every row goes through a few matrices of a stack, chosen by a router.

A route, the choice for a row, is 2 * used float32: the numbers of the experts (whole, exact below
2^24), best first, then their strengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .linear import dequantize, weight_type
from .op import (
    MATRIX,
    OPTIONAL_ROWS,
    OPTIONAL_VECTOR,
    ROWS,
    Kind,
    Op,
    Operand,
    ShapeError,
    Weight,
    expect,
)

#: What makes strengths of a router's scores.
SOFTMAX, SIGMOID = 0, 1
#: Experts that a row may go to, and groups: kernels number pairs of rows and experts in 32 bits,
#: and searching through more takes time that nobody would wait for.
MOST_USED = 1 << 12
#: Rows of an expert that a kernel puts side by side at once, and those it may read behind them.
GATHERED = 64
_TILED = GATHERED + 4
_FLOAT, _LINE = 4, 64


def route_memory(experts: int, groups: int) -> tuple[int, int, int]:
    """How a kernel lays out strengths, what it chooses by, and the sums of groups, in bytes.

    Returns where the last two begin, and the end.
    """
    wanted = (_FLOAT * experts + _LINE - 1) // _LINE * _LINE
    return wanted, 2 * wanted, 2 * wanted + _FLOAT * groups


def _route_scratch(operands: Mapping[str, Any], attributes: Mapping[str, Any], rows: int) -> int:
    return route_memory(operands["scores"].width, attributes["groups"])[-1]


def _route_shape(
    scores: Any,
    bias: Weight | None = None,
    *,
    used: int,
    gating: int = SOFTMAX,
    normalise: int = 1,
    scale: float = 1.0,
    eps: float = 0.0,
    groups: int = 1,
    groups_used: int = 1,
) -> int:
    expect(bias, scores.width)
    if not 0 < groups_used <= groups <= MOST_USED or scores.width % groups:
        raise ShapeError(
            f"{groups_used} groups cannot be chosen from {scores.width} experts in {groups}"
        )
    if not 0 < used <= min(MOST_USED, scores.width // groups * groups_used):
        raise ShapeError(f"{used} experts cannot be chosen from {scores.width}")
    if groups > 1 and scores.width // groups < 2:
        raise ShapeError(f"{groups} groups of {scores.width} experts have less than two each")
    return 2 * used


def route(
    scores: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    used: int,
    gating: int = SOFTMAX,
    normalise: int = 1,
    scale: float = 1.0,
    eps: float = 0.0,
    groups: int = 1,
    groups_used: int = 1,
) -> np.ndarray:
    """The `used` experts that score best, and how strong each is.

    scores: (T, experts). A strength is the softmax over all scores, or the sigmoid of one; with
    `normalise` it is divided by the sum of those chosen plus `eps`; then it is multiplied by
    `scale`. bias: (experts,), added to strengths for the choice alone. Of several groups, those
    whose best two add up to most are chosen from. Ties go to the lowest number. Returns routes,
    (T, 2 * used). Source: arXiv 2101.03961; bias and groups arXiv 2412.19437, section 2.1.2.
    """
    exact = scores.astype(np.float64)
    if gating == SOFTMAX:
        strengths = np.exp(exact - exact.max(axis=1, keepdims=True))
        strengths /= strengths.sum(axis=1, keepdims=True)
    else:
        strengths = 1 / (1 + np.exp(-exact))
    # Both rise with the score, which tells more of them apart, but only strengths may be added.
    wanted = exact if bias is None and groups == 1 else strengths
    if bias is not None:
        wanted = wanted + bias.reshape(-1)
    if groups > 1:
        parts = wanted.reshape(len(scores), groups, -1)
        best = np.sort(parts, axis=2)[:, :, -2:].sum(axis=2)
        kept = np.argsort(-best, axis=1, kind="stable")[:, :groups_used]
        outside = np.ones((len(scores), groups, 1), bool)
        np.put_along_axis(outside[..., 0], kept, False, axis=1)
        wanted = np.where(outside, -np.inf, parts).reshape(scores.shape)
    chosen = np.argsort(-wanted, axis=1, kind="stable")[:, :used]
    strengths = np.take_along_axis(strengths, chosen, axis=1)
    if normalise:
        strengths = strengths / (strengths.sum(axis=1, keepdims=True) + eps)
    return np.concatenate([chosen, scale * strengths], axis=1).astype(np.float32)


def memory(experts: int, pairs: int, part: int) -> tuple[int, int, int, int, int]:
    """How a kernel lays out what it needs to multiply `pairs` parts of `part` floats, in bytes.

    From 0 on, where the pairs of each expert end. Then follow, and these are returned: the experts
    that have any, the pairs sorted by expert, some parts side by side, their products; the end.
    """
    chosen = _FLOAT * (experts + 1)
    sorted_pairs = chosen + _FLOAT * experts
    gathered = (sorted_pairs + _FLOAT * pairs + _LINE - 1) // _LINE * _LINE
    products = gathered + _TILED * ((_FLOAT * part + _LINE - 1) // _LINE * _LINE)
    return chosen, sorted_pairs, gathered, products, products + _TILED * _LINE


def _expert_scratch(operands: Mapping[str, Any], attributes: Mapping[str, Any], rows: int) -> int:
    part = operands["x"].width // attributes["parts"]
    return memory(attributes["experts"], rows * attributes["used"], part)[-1]


def _divide(x: Any, weight: Weight, parts: int) -> int:
    if x.width % parts:
        raise ShapeError(f"{weight.name}: {x.width} values do not divide into {parts} parts")
    return x.width // parts


def _expert_linear_shape(
    x: Any, routes: Any, weight: Weight, *, width: int, used: int, experts: int, parts: int = 1
) -> int:
    expect(weight, experts, width, _divide(x, weight, parts))
    if parts not in (1, used) or (routes is None and used != experts) or used > MOST_USED:
        raise ShapeError(f"{weight.name}: {parts} parts do not go to {used} of {experts} experts")
    if routes is not None and routes.width != 2 * used:
        raise ShapeError(f"{weight.name}: routes of {routes.width} values do not name {used}")
    return used * width


def expert_linear(
    x: np.ndarray,
    routes: np.ndarray | None,
    weight: np.ndarray,
    *,
    width: int,
    used: int,
    experts: int,
    parts: int = 1,
) -> np.ndarray:
    """W_e x for each chosen expert e, side by side, best first.

    x: (T, parts * K) float32, or what `quantize` makes of its parts where W is Q8_0; one part for
    all experts, or one for each of those chosen. routes: (T, 2 * used); without them all matrices
    are used, in their order: one for every head. weight: (experts, width, K). Returns
    (T, used * width).
    """
    weight = weight.reshape(experts, width, -1)
    vectors = x.reshape(len(x) * parts, -1)
    if vectors.shape[1] != weight.shape[2]:
        vectors = dequantize(vectors)
    vectors = np.broadcast_to(vectors.reshape(len(x), parts, -1), (len(x), used, weight.shape[2]))
    out = np.empty((len(x), used, width), np.float32)
    every = np.tile(np.arange(used), (len(x), 1)) if routes is None else routes[:, :used]
    for t, chosen in enumerate(every.astype(int)):
        for rank, expert in enumerate(chosen):
            out[t, rank] = weight[expert] @ vectors[t, rank]
    return out.reshape(len(x), used * width)


def _expert_sum_shape(x: Any, routes: Any, *, used: int) -> int:
    if x.width % used or routes.width != 2 * used:
        raise ShapeError(f"rows of {x.width} values do not come from {used} experts")
    return x.width // used


def expert_sum(x: np.ndarray, routes: np.ndarray, *, used: int) -> np.ndarray:
    """The sum of strength_e x_e over the chosen experts, added up from the best one down.

    x: (T, used * D). routes: (T, 2 * used). Returns (T, D).
    """
    parts = x.reshape(len(x), used, x.shape[1] // used)
    out = np.zeros((len(x), parts.shape[2]), np.float32)
    for rank in range(used):
        out += routes[:, used + rank, None] * parts[:, rank]
    return out


OPS = (
    Op(
        "route",
        {"scores": ROWS, "bias": OPTIONAL_VECTOR},
        _route_shape,
        route,
        ("used", "gating", "normalise", "scale", "eps", "groups", "groups_used"),
        scratch=_route_scratch,
    ),
    Op(
        "expert_linear",
        {
            "x": Operand(Kind.ROWS, against="weight", parts="parts"),
            "routes": OPTIONAL_ROWS,
            "weight": MATRIX,
        },
        _expert_linear_shape,
        expert_linear,
        ("width", "used", "experts", "parts"),
        weight_type,
        _expert_scratch,
    ),
    Op("expert_sum", {"x": ROWS, "routes": ROWS}, _expert_sum_shape, expert_sum, ("used",)),
)
