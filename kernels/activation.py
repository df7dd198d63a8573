"""Element by element: activation functions, gates and residual sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from .op import OPTIONAL_VECTOR, ROWS, VECTOR, Op, ShapeError, Weight, expect


def _unary_shape(x: Any, bias: Weight | None = None, *, scale: float = 1.0) -> int:
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


def relu_squared(
    x: np.ndarray, bias: np.ndarray | None = None, *, scale: float = 1.0
) -> np.ndarray:
    """scale * max(y, 0)^2 of y = x + bias (arXiv 2109.08668). x: (T, D). Returns (T, D)."""
    return np.float32(scale) * np.square(np.maximum(_biased(x, bias), 0))


def _binary_shape(x: Any, y: Any, *, scale: float = 1.0) -> int:
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


def multiply(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x * y. x, y: (T, D). Returns (T, D)."""
    return x * y


def _gated_shape(x: Any, gate: Any) -> int:
    if not gate.width or x.width % gate.width:
        raise ShapeError(f"{gate.width} gates do not divide a row of {x.width} values evenly")
    return x.width


def gated(x: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """x * sigmoid(gate). x: (T, D). gate: (T, G), one for every D / G values. Returns (T, D)."""
    gates = 1 / (1 + np.exp(-gate))
    return (x.reshape(*gate.shape, -1) * gates[..., None]).reshape(x.shape)


def _bounded_decay_shape(x: Any, rate: Weight, bias: Weight, *, bound: float, heads: int) -> int:
    expect(rate, heads)
    expect(bias, x.width)
    if x.width % heads:
        raise ShapeError(f"{rate.name}: {x.width} values do not divide into {heads} heads")
    return x.width


def bounded_decay(
    x: np.ndarray, rate: np.ndarray, bias: np.ndarray, *, bound: float, heads: int
) -> np.ndarray:
    """-bound * sigmoid(rate_h * (x + bias)): logarithms of decays that are never below -bound.

    x: (T, heads * K). rate: (heads,). bias: (heads * K,). Returns (T, heads * K). Source: the safe
    gate of Kimi Delta Attention in flash-linear-attention.
    """
    y = _biased(x, bias).reshape(len(x), heads, -1) * rate.reshape(heads, 1)
    return (-bound / (1 + np.exp(-y))).reshape(x.shape).astype(np.float32)


OPS = (
    *(
        Op(
            function.__name__,
            {"x": ROWS, "bias": OPTIONAL_VECTOR},
            _unary_shape,
            function,
            ("scale",),
        )
        for function in (scaled, silu, sigmoid, softplus, relu_squared)
    ),
    Op("add", {"x": ROWS, "y": ROWS}, _binary_shape, add, ("scale",)),
    Op("swiglu", {"x": ROWS, "y": ROWS}, _binary_shape, swiglu),
    Op("multiply", {"x": ROWS, "y": ROWS}, _binary_shape, multiply),
    Op("gated", {"x": ROWS, "gate": ROWS}, _gated_shape, gated),
    Op(
        "bounded_decay",
        {"x": ROWS, "rate": VECTOR, "bias": VECTOR},
        _bounded_decay_shape,
        bounded_decay,
        ("bound", "heads"),
    ),
)
