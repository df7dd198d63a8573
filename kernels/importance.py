"""What is asked of a matrix: sums over rows of the squares of its inputs, column by column.

They say which columns a quantizer has to keep. Source: llama.cpp's tools/imatrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .op import OPTIONAL_ROWS, ROWS, STATE, Op, ShapeError, expect_state


def _sum_squares_shape(
    x: Any, routes: Any, sums: Any, *, matrices: int = 1, used: int = 1, parts: int = 1
) -> int:
    if x.width % parts or parts not in (1, used):
        raise ShapeError(f"{sums.name}: {x.width} values in {parts} parts do not go to {used}")
    if routes is None and used != matrices:
        raise ShapeError(f"{sums.name}: without routes all {matrices} matrices are used")
    if routes is not None and routes.width != 2 * used:
        raise ShapeError(f"{sums.name}: routes of {routes.width} values do not name {used}")
    expect_state(sums, matrices, x.width // parts + 1)
    return 0


def sum_squares(
    x: np.ndarray,
    routes: np.ndarray | None,
    sums: np.ndarray,
    *,
    matrices: int = 1,
    used: int = 1,
    parts: int = 1,
) -> np.ndarray:
    """Add to sums[e] the squares of what matrix e multiplies, and behind them 1 for each input.

    x: (T, parts * K), rows of one sequence: one part for all matrices that are used, or one for
    each. routes: (T, 2 * used), as `expert_linear` has them; without them a row goes to all
    matrices, in their order. sums: (matrices, K + 1), changed in place, row after row. Returns
    (T, 0).
    """
    vectors = x.reshape(len(x), parts, -1)
    vectors = np.broadcast_to(vectors, (len(x), used, vectors.shape[2]))
    every = np.tile(np.arange(used), (len(x), 1)) if routes is None else routes[:, :used]
    for t, chosen in enumerate(every.astype(int)):
        for rank, matrix in enumerate(chosen):
            sums[matrix, :-1] += vectors[t, rank] * vectors[t, rank]
            sums[matrix, -1] += 1
    return np.zeros((len(x), 0), np.float32)


OPS = (
    Op(
        "sum_squares",
        {"x": ROWS, "routes": OPTIONAL_ROWS, "sums": STATE},
        _sum_squares_shape,
        sum_squares,
        ("matrices", "used", "parts"),
    ),
)
