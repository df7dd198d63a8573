"""Gated DeltaNet (arXiv 2412.06464): its mixer and a gated MLP in every layer.

Source: the model `gated_deltanet` of flash-linear-attention. In some layers of some checkpoints
attention stands in place of the mixer: where `attention.head_count_kv` is not 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import delta
from .blocks import attend, gated_mlp, queries_keys_values
from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters
from .rope import rotate_both

ARCHITECTURE = "gated-deltanet"


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    eps = p.number("attention.layer_norm_rms_epsilon")
    return trunk(g, p, w, lambda blk, i, x: delta.mixer(g, p, blk, i, x, eps=eps))


def trunk(g: Graph, p: Hyperparameters, w: Any, mixer: Callable[[Any, int, Value], Value]) -> Value:
    """All of the model; mixer: of a layer's tensors, its number and its input."""
    d_model = p.count("embedding_length")
    d_ff = p.count("feed_forward_length")
    layers = p.count("block_count")
    eps = p.number("attention.layer_norm_rms_epsilon")
    h = g.embedding(w.token_embd, width=d_model)
    for i, key_heads in enumerate(p.per_layer("attention.head_count_kv", layers, 0)):
        blk = w.blk[i]
        x = g.rms_norm(h, blk.attn_norm, eps=eps)
        if key_heads:
            h = g.add(h, _attention(g, p, w, i, x, key_heads))
        else:
            h = g.add(h, mixer(blk, i, x))
        x = g.rms_norm(h, blk.ffn_norm, eps=eps)
        y = gated_mlp(g, x, blk, width=d_ff, d_model=d_model)
        h = g.add(h, y)
    return logits(g, h, w, eps)


def _attention(g: Graph, p: Hyperparameters, w: Any, i: int, x: Value, key_heads: int) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D)."""
    d_model, layers = p.count("embedding_length"), p.count("block_count")
    heads = p.heads(i)
    d_head = p.divide(d_model, "attention.head_count", heads)
    q, k, v = queries_keys_values(g, w.blk[i], x, d_model, *2 * [key_heads * d_head])
    q, k = rotate_both(g, p, w, q, k, heads=heads, key_heads=key_heads, count=d_head)
    slides = p.flags("attention.sliding_window_pattern", layers)
    window = p.count("attention.sliding_window", 0, least=0) if slides is None or slides[i] else 0
    scale = d_head**-0.5
    y = attend(g, i, q, k, v, heads=heads, key_heads=key_heads, scale=scale, window=window)
    return g.linear(y, w.blk[i].attn_output, width=d_model)
