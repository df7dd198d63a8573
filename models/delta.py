"""The mixer of Gated DeltaNet: a decaying matrix state that erases what a key held before it
writes anew.

Source: arXiv 2412.06464, with the short convolution and the output gate of flash-linear-attention,
of which a model may lack either. Files hold value heads in tiled order (head h reads key head
h mod Hk), or, with `GROUPED`, as checkpoints have them (h // r); then projections of one key head
may lie in one piece: `ssm_ba`, and in older files `ssm_in`.
"""

from __future__ import annotations

from typing import Any

from ..kernels.norm import NORM_FIRST
from ..kernels.recurrence import GROUPED, TILED
from .graph import Graph, Value
from .hyperparameters import Hyperparameters

#: The epsilon under the root of the L2 norm of queries and keys, fixed in the reference.
L2_EPS = 1e-6


def mixer(
    g: Graph, p: Hyperparameters, blk: Any, i: int, x: Value, *, eps: float, mapping: int = TILED
) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D).

    eps: of the norm behind the recurrence.
    """
    key_heads = p.count("ssm.group_count")
    heads = p.count("ssm.time_step_rank")
    d_key = p.count("ssm.state_size")
    d_inner = p.count("ssm.inner_size")
    d_value = p.divide(d_inner, "ssm.time_step_rank", heads)
    taps = p.count("ssm.conv_kernel", None)
    keys = key_heads * d_key

    qkv, gate = _projected(g, p, blk, x, mapping)
    if taps is None:
        qkv = g.silu(qkv)
    else:
        window = g.state(f"blk.{i}.conv", taps - 1, 2 * keys + d_inner)
        qkv = g.causal_conv(qkv, window, blk.ssm_conv1d, taps=taps, silu=1)
    q, k, v = g.split(qkv, keys, keys, d_inner)
    q = g.l2_norm(q, eps=L2_EPS, groups=key_heads, scale=d_key**-0.5)
    k = g.l2_norm(k, eps=L2_EPS, groups=key_heads, scale=1.0)
    dt, beta = _steps(g, p, blk, x, mapping)

    state = g.state(f"blk.{i}.ssm", heads, d_key, d_value)
    o = g.recurrence(
        q, k, v, dt, beta, state, blk.ssm_a,
        heads=heads, key_heads=key_heads, mapping=mapping, decay="head", erase="tied",
    )  # fmt: skip
    o = g.rms_norm(o, blk.ssm_norm, gate, eps=eps, groups=heads, order=NORM_FIRST if gate else 0)
    return g.linear(o, blk.ssm_out, width=p.count("embedding_length"))


def _projected(
    g: Graph, p: Hyperparameters, blk: Any, x: Value, mapping: int
) -> tuple[Value, Value | None]:
    """Queries, keys and values side by side, all heads of each, and the output gate."""
    key_heads, d_inner = p.count("ssm.group_count"), p.count("ssm.inner_size")
    d_key = p.count("ssm.state_size")
    keys = key_heads * d_key
    if mapping == GROUPED and blk.ssm_in.find():
        # For each key head its query, its key, and the values and gates of its value heads.
        mixed = g.linear(x, blk.ssm_in, width=2 * keys + 2 * d_inner)
        d_values = p.divide(d_inner, "ssm.group_count", key_heads)
        starts, widths = (0, d_key, 2 * d_key, 2 * d_key + d_values), 2 * [d_key] + 2 * [d_values]
        q, k, v, gate = (
            g.columns(mixed, groups=key_heads, start=start, width=width)
            for start, width in zip(starts, widths, strict=True)
        )
        return g.join(g.join(q, k, groups=1), v, groups=1), gate
    qkv = g.linear(x, blk.attn_qkv, width=2 * keys + d_inner)
    if not p.flag("ssm.use_gate", True):
        return qkv, None
    return qkv, g.linear(x, blk.attn_gate, width=d_inner)


def _steps(g: Graph, p: Hyperparameters, blk: Any, x: Value, mapping: int) -> tuple[Value, Value]:
    """For each value head, how long the token's step is and how strongly it writes."""
    heads, key_heads = p.count("ssm.time_step_rank"), p.count("ssm.group_count")
    if mapping == GROUPED and blk.ssm_ba.find():
        mixed = g.linear(x, blk.ssm_ba, width=2 * heads)
        each = p.divide(heads, "ssm.group_count", key_heads)
        beta, dt = (
            g.columns(mixed, groups=key_heads, start=start, width=each) for start in (0, each)
        )
    else:
        dt = g.linear(x, blk.ssm_alpha, width=heads)
        beta = g.linear(x, blk.ssm_beta, width=heads)
    strongest = 2.0 if p.flag("ssm.allow_neg_eigval", False) else 1.0
    return g.softplus(dt, blk.ssm_dt.bias), g.sigmoid(beta, scale=strongest)
