"""Rows taken by index: embeddings of token ids, and the rows whose logits were asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from .linear import weight_type
from .op import IDS, MATRIX, OUTPUTS, ROWS, Op, Weight, expect


def _embedding_shape(ids: Any, weight: Weight, *, width: int) -> int:
    expect(weight, weight.shape[0], width)
    return width


def embedding(ids: np.ndarray, weight: np.ndarray, *, width: int) -> np.ndarray:
    """Look up one row per token.

    ids: (T,) int64, checked by the caller. weight: (vocabulary, width) float32.
    Returns (T, width).
    """
    return weight.reshape(-1, width)[ids]


def _select_shape(x: Any, rows: Any) -> int:
    return x.width


def select(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Keep the rows whose logits were asked for.

    x: (T, D). rows: (R,) int64, ascending. Returns (R, D).
    """
    return x[rows]


OPS = (
    Op(
        "embedding",
        {"ids": IDS, "weight": MATRIX},
        _embedding_shape,
        embedding,
        ("width",),
        weight_type,
    ),
    Op("select", {"x": ROWS, "rows": OUTPUTS}, _select_shape, select),
)
