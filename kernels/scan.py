"""The selective scan of Mamba-1, where every state element has a decay of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .op import (
    ROWS,
    TYPED_STATE,
    VECTOR,
    Kind,
    Op,
    Operand,
    ShapeError,
    Weight,
    expect,
    expect_state,
    transposed,
)
from .statetypes import variant_of


def _selective_scan_shape(
    x: Any, dt: Any, b: Any, c: Any, state: Any, a: Weight, d: Weight, *, d_state: int
) -> int:
    expect(a, x.width, d_state)
    expect(d, x.width)
    expect_state(state, d_state, x.width)
    if dt.width != x.width or b.width != d_state or c.width != d_state:
        raise ShapeError(f"{a.name} goes with {x.width} channels of {d_state} state elements each")
    return x.width


def selective_scan(
    x: np.ndarray,
    dt: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    state: Any,
    a: np.ndarray,
    d: np.ndarray,
    *,
    d_state: int,
) -> np.ndarray:
    """S[n, i] = exp(dt[i] A[i, n]) S[n, i] + dt[i] x[i] B[n];  y = C S + D x.

    x, dt: (T, I), rows of one sequence. b, c: (T, N). state: its values (N, I) are updated, and
    rounded to its type behind every row: what is read with C has not been rounded yet.
    a: (I, N), negative. d: (I,). Returns (T, I). Source: Mamba, arXiv 2312.00752, algorithm 2.
    """
    y, rates, d = np.empty_like(x), a.reshape(x.shape[1], d_state).T, d.reshape(-1)
    for t in range(len(x)):
        matrix = state.values
        matrix[:] = matrix * np.exp(dt[t] * rates) + (dt[t] * x[t]) * b[t][:, None]
        y[t] = c[t] @ matrix + d * x[t]
        state.keep(t)
    return y


def _variant(operands: Mapping[str, Any], attributes: Mapping[str, Any]) -> str:
    return variant_of(operands["state"]).lstrip("_")


def _scratch(operands: Mapping[str, Any], attributes: Mapping[str, Any], rows: int) -> int:
    """Bytes of 16 channels before they are rounded, where that is done afterwards."""
    return 4 * 16 * attributes["d_state"] if operands["state"].kind.scaled else 0


OPS = (
    Op(
        "selective_scan",
        {
            "x": ROWS,
            "dt": ROWS,
            "b": ROWS,
            "c": ROWS,
            "state": TYPED_STATE,
            "a": Operand(Kind.VECTOR, pack=transposed),
            "d": VECTOR,
        },
        _selective_scan_shape,
        selective_scan,
        ("d_state",),
        _variant,
        _scratch,
    ),
)
