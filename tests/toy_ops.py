"""Two ops of models that are to come, as small as they can be: paged attention, and experts.

They are not in the catalogue; a graph takes them through `Graph.apply`, and their kernels lie in
`toy_ops_cpu.py` beside this file.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keelback.engine.state import CacheView
from keelback.kernels.op import CACHE, MATRIX, ROWS, Op, Weight, expect


def attention_shape(
    q: Any, k: Any, v: Any, keys: Any, values: Any, *, heads: int, scale: float
) -> int:
    assert q.width == k.width == v.width == keys.width == values.width and q.width % heads == 0
    return q.width


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keys: CacheView,
    values: CacheView,
    *,
    heads: int,
    scale: float,
) -> np.ndarray:
    """softmax(scale q K^T) V over all tokens up to the row's own, head by head.

    q, k, v: (T, heads * D), rows of one sequence. keys, values: its pages, k and v are added.
    Returns (T, heads * D).
    """
    keys.write(k)
    values.write(v)
    out = np.empty((len(q), heads, q.shape[1] // heads))
    for t, row in enumerate(q.reshape(out.shape).astype(np.float64)):
        count = keys.position + t + 1
        past = [cache.read(count).reshape(count, *row.shape) for cache in (keys, values)]
        scores = scale * np.einsum("hd,nhd->hn", row, past[0])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[t] = np.einsum("hn,nhd->hd", weights / weights.sum(axis=1, keepdims=True), past[1])
    return out.reshape(q.shape)


def experts_shape(x: Any, router: Any, weight: Weight, *, width: int, used: int) -> int:
    expect(weight, router.width, width, x.width)
    assert 0 < used <= router.width
    return width


def experts(
    x: np.ndarray, router: np.ndarray, weight: np.ndarray, *, width: int, used: int
) -> np.ndarray:
    """The sum of sigmoid(r_e) W_e x over the `used` experts with the largest r, the largest first.

    x: (T, K). router: (T, experts). weight: (experts, width, K). Ties go to the lowest index.
    Returns (T, width).
    """
    out = np.zeros((len(x), width), np.float32)
    for t, scores in enumerate(router):
        for expert in np.argsort(-scores, kind="stable")[:used]:
            out[t] += (weight[expert] @ x[t]) / (1 + np.exp(-scores[expert]))
    return out


ATTENTION = Op(
    "toy_attention",
    {"q": ROWS, "k": ROWS, "v": ROWS, "keys": CACHE, "values": CACHE},
    attention_shape,
    attention,
    ("heads", "scale"),
)
EXPERTS = Op(
    "toy_experts",
    {"x": ROWS, "router": ROWS, "weight": MATRIX},
    experts_shape,
    experts,
    ("used",),
)
