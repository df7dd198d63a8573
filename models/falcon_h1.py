"""Falcon-H1: in every layer Mamba-2 and attention side by side, and an MLP behind them.

Source: arXiv 2507.22448 and the model `falcon_h1` of transformers, whose multipliers are in the
weights.
"""

from __future__ import annotations

from typing import Any

from ..kernels.norm import GATE_FIRST, NORM_FIRST
from . import mamba2
from .blocks import attend, gated_mlp, queries_keys_values
from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters
from .rope import rotate_both

ARCHITECTURE = "falcon-h1"


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    d_model, d_ff = p.count("embedding_length"), p.count("feed_forward_length")
    eps = p.number("attention.layer_norm_rms_epsilon")
    order = NORM_FIRST if p.flag("ssm.norm_before_gate", False) else GATE_FIRST
    h = g.embedding(w.token_embd, width=d_model)
    for i in range(p.count("block_count")):
        blk = w.blk[i]
        x = g.rms_norm(h, blk.attn_norm, eps=eps)
        normed = order if blk.ssm_norm.find() else 0
        y = mamba2.mixer(g, p, blk, i, x, eps=eps, order=normed)
        h = g.add(h, g.add(y, _attention(g, p, w, i, x)))
        x = g.rms_norm(h, blk.ffn_norm, eps=eps)
        y = gated_mlp(g, x, blk, width=d_ff, d_model=d_model)
        h = g.add(h, y)
    return logits(g, h, w, eps)


def _attention(g: Graph, p: Hyperparameters, w: Any, i: int, x: Value) -> Value:
    """x: the normalised residual stream (T, D). Returns what attention adds to it, (T, D)."""
    blk, d_model = w.blk[i], p.count("embedding_length")
    heads = p.count("attention.head_count")
    key_heads = p.count("attention.head_count_kv", heads)
    d_head = p.head_width(heads)
    d_value = p.count("attention.value_length", d_head)
    turned = p.count("rope.dimension_count", d_head)
    widths = heads * d_head, key_heads * d_head, key_heads * d_value
    q, k, v = queries_keys_values(g, blk, x, *widths)
    q, k = rotate_both(g, p, w, q, k, heads=heads, key_heads=key_heads, count=turned)
    y = attend(g, i, q, k, v, heads=heads, key_heads=key_heads, scale=d_head**-0.5)
    return g.linear(y, blk.attn_output, width=d_model)
