"""The short causal convolution in front of a recurrence, its window kept in the state."""

from __future__ import annotations

from typing import Any

import numpy as np

from .op import (
    OPTIONAL_VECTOR,
    ROWS,
    STATE,
    Kind,
    Op,
    Operand,
    Weight,
    expect,
    expect_state,
    transposed,
)


def _causal_conv_shape(
    x: Any, window: Any, weight: Weight, bias: Weight | None = None, *, taps: int, silu: int
) -> int:
    expect(weight, x.width, taps)
    expect(bias, x.width)
    expect_state(window, taps - 1, x.width)
    return x.width


def causal_conv(
    x: np.ndarray,
    window: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    taps: int,
    silu: int,
) -> np.ndarray:
    """y[t, c] = b[c] + sum_j w[c, j] x[t - taps + 1 + j, c], one filter per channel, then silu.

    x: (T, C), rows of one sequence. window: (taps - 1, C), the inputs before the first row, oldest
    first; overwritten with the last ones. weight: (C, taps), the newest input under its last tap.
    Returns (T, C).
    """
    rows = np.concatenate([window, x])
    y = np.zeros_like(x) if bias is None else np.tile(bias.reshape(-1), (len(x), 1))
    for tap in range(taps):
        y = y + rows[tap : tap + len(x)] * weight.reshape(x.shape[1], taps)[:, tap]
    window[:] = rows[len(x) :]
    return y / (1 + np.exp(-y)) if silu else y


OPS = (
    Op(
        "causal_conv",
        {
            "x": ROWS,
            "window": STATE,
            "weight": Operand(Kind.VECTOR, pack=transposed),
            "bias": OPTIONAL_VECTOR,
        },
        _causal_conv_shape,
        causal_conv,
        ("taps", "silu"),
    ),
)
