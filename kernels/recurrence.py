"""The one recurrence of the family: a matrix S per head, decayed, erased and written at each token.

    S_t = D_t S_{t-1} + k_t u_t^T        o_t = S_t^T q_t

`decay` says whether D is one number a head or one a row of S, `erase` whether u is beta v (Mamba-2,
linear attention) or beta (v - (D S)^T k), which first takes out what k has stored (the delta rule).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .op import (
    OPTIONAL_VECTOR,
    ROWS,
    TYPED_STATE,
    Op,
    ShapeError,
    Weight,
    expect,
    expect_state,
)
from .statetypes import variant_of

#: How a value head finds its key head: h // r, or h mod key heads.
GROUPED, TILED = 0, 1
#: Rows whose decays by key a kernel works out at once.
DECAYED = 16
#: Columns of a state that a kernel takes through all rows together.
STRIP = 64


def _recurrence_shape(
    q: Any,
    k: Any,
    v: Any,
    dt: Any,
    beta: Any,
    state: Any,
    a: Weight | None = None,
    d: Weight | None = None,
    *,
    heads: int,
    key_heads: int,
    mapping: int,
    decay: str,
    erase: str,
) -> int:
    expect(a, heads)
    expect(d, heads)
    if heads % key_heads or q.width % key_heads or v.width % heads or q.width != k.width:
        raise ShapeError(
            f"{state.name}: {heads} value heads do not share {key_heads} key heads evenly"
        )
    decays = heads if decay == "head" else heads * (k.width // key_heads)
    if dt.width != decays or beta.width != heads:
        raise ShapeError(f"{state.name}: {decays} decays and {heads} strengths a token are needed")
    expect_state(state, heads, k.width // key_heads, v.width // heads)
    return v.width


def recurrence(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dt: np.ndarray,
    beta: np.ndarray,
    state: Any,
    a: np.ndarray | None = None,
    d: np.ndarray | None = None,
    *,
    heads: int,
    key_heads: int,
    mapping: int,
    decay: str,
    erase: str,
) -> np.ndarray:
    """Walk the rows of one sequence and return o (+ D v where a skip weight is given).

    q, k: (T, key_heads * K). v: (T, heads * V). dt: (T, heads), or (T, heads * K) with decay
    "key"; D = exp(A dt). beta: (T, heads). state: its values (heads, K, V) are updated, and
    rounded to its type behind every row: what is read with q has not been rounded yet.
    a: (heads,), negative; without it dt is the logarithm of D itself. d: (heads,). erase: "none" or
    "tied". Returns (T, heads * V).
    Source: Mamba-2, arXiv 2405.21060, section 5; Gated DeltaNet, arXiv 2412.06464, equation 10;
    Kimi Delta Attention, arXiv 2510.26692, equation 1.
    """
    rows = len(v)
    q, k = (part.reshape(rows, key_heads, -1) for part in (q, k))
    head = np.arange(heads)
    key_head = head // (heads // key_heads) if mapping == GROUPED else head % key_heads
    q, k, values = q[:, key_head], k[:, key_head], v.reshape(rows, heads, -1)
    rates = 1 if a is None else a.reshape(heads, 1)
    decays = np.exp(rates * dt.reshape(rows, heads, -1))
    out = np.empty_like(values)
    for t in range(rows):
        matrix = state.values
        matrix *= decays[t][:, :, None]
        write = values[t]
        if erase == "tied":
            write = write - np.einsum("hkv,hk->hv", matrix, k[t])
        matrix += k[t][:, :, None] * (beta[t][:, None] * write)[:, None, :]
        out[t] = np.einsum("hkv,hk->hv", matrix, q[t])
        state.keep(t)
    if d is not None:
        out += d.reshape(heads, 1) * values
    return out.reshape(rows, -1)


def _variant(operands: Mapping[str, Any], attributes: Mapping[str, Any]) -> str:
    return f"{attributes['decay']}_{attributes['erase']}{variant_of(operands['state'])}"


def decay_memory(d_key: int) -> tuple[int, int]:
    """How a kernel lays out decays by key, and behind them their products with the keys, in bytes.

    Returns where the latter begin, and the end.
    """
    return 4 * DECAYED * d_key, 8 * DECAYED * d_key


def _scratch(operands: Mapping[str, Any], attributes: Mapping[str, Any], rows: int) -> int:
    """Bytes: decays, and a strip of a state before it is rounded, where that is done afterwards."""
    d_key = operands["k"].width // attributes["key_heads"]
    decays = decay_memory(d_key)[-1] if attributes["decay"] == "key" else 0
    return decays + (4 * STRIP * d_key if operands["state"].kind.scaled else 0)


OPS = (
    Op(
        "recurrence",
        {
            "q": ROWS,
            "k": ROWS,
            "v": ROWS,
            "dt": ROWS,
            "beta": ROWS,
            "state": TYPED_STATE,
            "a": OPTIONAL_VECTOR,
            "d": OPTIONAL_VECTOR,
        },
        _recurrence_shape,
        recurrence,
        ("heads", "key_heads", "mapping"),
        _variant,
        _scratch,
    ),
)
