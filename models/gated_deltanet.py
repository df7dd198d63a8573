"""Gated DeltaNet: a decaying matrix state that erases what a key held before it writes anew.

Source: arXiv 2412.06464, with the short convolutions and the output gate of flash-linear-attention,
of which a model may lack either.
"""

from __future__ import annotations

from typing import Any

from ..kernels.norm import NORM_FIRST
from ..kernels.recurrence import TILED
from .blocks import gated_mlp
from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters

ARCHITECTURE = "gated-deltanet"

#: The epsilon under the root of the L2 norm of queries and keys, fixed in the reference.
L2_EPS = 1e-6


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    d_model = p.count("embedding_length")
    d_ff = p.count("feed_forward_length")
    eps = p.number("attention.layer_norm_rms_epsilon")
    h = g.embedding(w.token_embd, width=d_model)
    for i in range(p.count("block_count")):
        blk = w.blk[i]
        h = g.add(h, _mixer(g, p, blk, i, g.rms_norm(h, blk.attn_norm, eps=eps)))
        x = g.rms_norm(h, blk.ffn_norm, eps=eps)
        y = gated_mlp(g, x, blk.ffn_gate, blk.ffn_up, blk.ffn_down, width=d_ff, d_model=d_model)
        h = g.add(h, y)
    return logits(g, h, w, eps)


def _mixer(g: Graph, p: Hyperparameters, blk: Any, i: int, x: Value) -> Value:
    """x: the normalised residual stream (T, D). Returns what the layer adds to it, (T, D)."""
    key_heads = p.count("ssm.group_count")
    heads = p.count("ssm.time_step_rank")
    d_key = p.count("ssm.state_size")
    d_inner = p.count("ssm.inner_size")
    d_value = p.divide(d_inner, "ssm.time_step_rank", heads)
    taps = p.count("ssm.conv_kernel", None)
    eps = p.number("attention.layer_norm_rms_epsilon")
    keys = key_heads * d_key

    qkv = g.linear(x, blk.attn_qkv, width=2 * keys + d_inner)
    if taps is None:
        qkv = g.silu(qkv)
    else:
        window = g.state(f"blk.{i}.conv", taps - 1, 2 * keys + d_inner)
        qkv = g.causal_conv(qkv, window, blk.ssm_conv1d, taps=taps, silu=1)
    q, k, v = g.split(qkv, keys, keys, d_inner)
    q = g.l2_norm(q, eps=L2_EPS, groups=key_heads, scale=d_key**-0.5)
    k = g.l2_norm(k, eps=L2_EPS, groups=key_heads, scale=1.0)
    dt = g.softplus(g.linear(x, blk.ssm_alpha, width=heads), blk.ssm_dt.bias)
    strongest = 2.0 if p.flag("ssm.allow_neg_eigval", False) else 1.0
    beta = g.sigmoid(g.linear(x, blk.ssm_beta, width=heads), scale=strongest)

    state = g.state(f"blk.{i}.ssm", heads, d_key, d_value)
    o = g.recurrence(
        q, k, v, dt, beta, state, blk.ssm_a,
        heads=heads, key_heads=key_heads, mapping=TILED, decay="head", erase="tied",
    )  # fmt: skip
    gate = g.linear(x, blk.attn_gate, width=d_inner) if p.flag("ssm.use_gate", True) else None
    o = g.rms_norm(o, blk.ssm_norm, gate, eps=eps, groups=heads, order=NORM_FIRST if gate else 0)
    return g.linear(o, blk.ssm_out, width=p.count("embedding_length"))
