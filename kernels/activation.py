"""Element by element: activation functions, gates and residual sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from .op import OPTIONAL_VECTOR, ROWS, Op, ShapeError, Weight, expect


def unary_shape(x: Any, bias: Weight | None = None, *, scale: float = 1.0) -> int:
    expect(bias, x.width)
    return x.width


def _biased(x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return x if bias is None else x + bias.reshape(-1)


def scaled(x: np.ndarray, bias: np.ndarray | None = None, *, scale: float = 1.0) -> np.ndarray:
    """scale * (x + bias). x: (T, D). bias: (D,). Returns (T, D)."""
    return np.float32(scale) * _biased(x, bias)


def silu(x: np.ndarray, bias: np.ndarray | None = None, *, scale: float = 1.0) -> np.ndarray:
    """scale * y sigmoid(y) of y = x + bias. x: (T, D). bias: (D,). Returns (T, D)."""
    y = _biased(x, bias)
    return (scale * y / (1 + np.exp(-y))).astype(np.float32)


def sigmoid(x: np.ndarray, bias: np.ndarray | None = None, *, scale: float = 1.0) -> np.ndarray:
    """scale / (1 + exp(-y)) of y = x + bias. x: (T, D). bias: (D,). Returns (T, D)."""
    return (scale / (1 + np.exp(-_biased(x, bias)))).astype(np.float32)


def softplus(x: np.ndarray, bias: np.ndarray | None = None, *, scale: float = 1.0) -> np.ndarray:
    """scale * log(1 + exp(y)) of y = x + bias, y itself above 20. x: (T, D). Returns (T, D)."""
    y = _biased(x, bias)
    return (scale * np.where(y > 20, y, np.log1p(np.exp(np.minimum(y, 20))))).astype(np.float32)


def binary_shape(x: Any, y: Any, *, scale: float = 1.0) -> int:
    if x.width != y.width:
        raise ShapeError(
            f"rows of {x.width} and {y.width} values cannot be combined element by element"
        )
    return x.width


def add(x: np.ndarray, y: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
    """x + scale * y. x, y: (T, D). Returns (T, D)."""
    return x + np.float32(scale) * y


def swiglu(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """silu(x) * y: a gated MLP, Mamba-1's output gate. x, y: (T, D). Returns (T, D)."""
    return x / (1 + np.exp(-x)) * y


OPS = (
    *(
        Op(
            function.__name__,
            {"x": ROWS, "bias": OPTIONAL_VECTOR},
            unary_shape,
            function,
            ("scale",),
        )
        for function in (scaled, silu, sigmoid, softplus)
    ),
    Op("add", {"x": ROWS, "y": ROWS}, binary_shape, add, ("scale",)),
    Op("swiglu", {"x": ROWS, "y": ROWS}, binary_shape, swiglu),
)
