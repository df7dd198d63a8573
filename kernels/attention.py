"""Causal attention over KV pages: rows are first stored there, then read back by all heads."""

from __future__ import annotations

from typing import Any

import numpy as np

from .op import CACHE, ROWS, Op, ShapeError

#: Tokens whose scores are taken together. A sum runs over tiles in ascending order, and a tile
#: begins at a multiple of this many tokens, so that it does not matter how the tokens arrived.
TILE = 64


def store_shape(x: Any, cache: Any) -> int:
    if x.width != cache.width:
        raise ShapeError(f"rows of {x.width} values cannot be stored in {cache.name}")
    return 0


def store(x: np.ndarray, cache: Any) -> np.ndarray:
    """Append rows to the KV pages; ops behind this one read them from there.

    x: (T, D), rows of one sequence. cache: a view of its pages, D columns. Returns (T, 0).
    """
    cache.write(x)
    return np.zeros((len(x), 0), np.float32)


def attention_shape(
    q: Any, keys: Any, values: Any, *, heads: int, key_heads: int, scale: float
) -> int:
    if heads % key_heads or q.width % heads or values.width % key_heads:
        raise ShapeError(f"{keys.name}: {heads} heads do not share {key_heads} key heads evenly")
    if q.width // heads * key_heads != keys.width:
        raise ShapeError(
            f"{keys.name}: queries of {q.width} values in {heads} heads do not meet keys of "
            f"{keys.width} in {key_heads}"
        )
    return values.width // key_heads * heads


def attention(
    q: np.ndarray, keys: Any, values: Any, *, heads: int, key_heads: int, scale: float
) -> np.ndarray:
    """softmax(scale q K^T) V over all tokens up to the row's own, head by head.

    q: (T, heads * K), the last rows that one sequence has stored. keys: its pages, key_heads * K
    columns. values: key_heads * V. Head h reads key head h // (heads / key_heads) (grouped queries,
    arXiv 2305.13245). Returns (T, heads * V).
    """
    group = heads // key_heads
    out = []
    for t, row in enumerate(q.reshape(len(q), key_heads, group, -1).astype(np.float64)):
        count = keys.position + t + 1
        k, v = (cache.read(count).reshape(count, key_heads, -1) for cache in (keys, values))
        scores = scale * np.einsum("kgd,nkd->kgn", row, k)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        out.append(np.einsum("kgn,nkd->kgd", weights, v).reshape(-1))
    return np.array(out, np.float32)


OPS = (
    Op("store", {"x": ROWS, "cache": CACHE}, store_shape, store),
    Op(
        "attention",
        {"q": ROWS, "keys": CACHE, "values": CACHE},
        attention_shape,
        attention,
        ("heads", "key_heads", "scale"),
    ),
)
