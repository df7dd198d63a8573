"""Jamba: Mamba-1 layers, a few of attention without positions, and an MLP or experts behind each.

Source: arXiv 2403.19887 and the model `jamba` of transformers. A layer is one of attention where
`attention.head_count_kv` is not 0 for it, and has experts where the file has a router for it.
"""

from __future__ import annotations

from typing import Any

from . import mamba
from .blocks import attend, gated_mlp, mixture, queries_keys_values
from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters

ARCHITECTURE = "jamba"


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    eps = p.number("attention.layer_norm_rms_epsilon")
    layers = p.count("block_count")
    h = g.embedding(w.token_embd, width=p.count("embedding_length"))
    for i, key_heads in enumerate(p.per_layer("attention.head_count_kv", layers)):
        blk = w.blk[i]
        x = g.rms_norm(h, blk.attn_norm, eps=eps)
        if key_heads:
            y = _attention(g, p, blk, i, x, key_heads)
        else:
            norms = blk.ssm_dt_norm, blk.ssm_b_norm, blk.ssm_c_norm
            y = mamba.mixer(g, p, blk, i, x, norms=norms, eps=eps)
        h = g.add(h, y)
        h = g.add(h, _feed_forward(g, p, blk, g.rms_norm(h, blk.ffn_norm, eps=eps)))
    return logits(g, h, w, eps)


def _attention(g: Graph, p: Hyperparameters, blk: Any, i: int, x: Value, key_heads: int) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D)."""
    d_model, heads = p.count("embedding_length"), p.count("attention.head_count")
    d_head = p.divide(d_model, "attention.head_count", heads)
    widths = d_model, key_heads * d_head, key_heads * d_head
    q, k, v = queries_keys_values(g, blk, x, *widths)
    y = attend(g, i, q, k, v, heads=heads, key_heads=key_heads, scale=d_head**-0.5)
    return g.linear(y, blk.attn_output, width=d_model)


def _feed_forward(g: Graph, p: Hyperparameters, blk: Any, x: Value) -> Value:
    """x: the normalised residual stream (T, D). Returns what is added to it, (T, D)."""
    d_model, d_ff = p.count("embedding_length"), p.count("feed_forward_length")
    if not blk.ffn_gate_inp.find():
        return gated_mlp(g, x, blk, width=d_ff, d_model=d_model)
    used = p.count("expert_used_count")
    return mixture(g, x, blk, used=used, width=d_ff, d_model=d_model, normalise=0)
