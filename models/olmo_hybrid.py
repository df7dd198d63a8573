"""OLMo-Hybrid: Gated DeltaNet, and behind every few such layers one of attention.

Source: the model `olmo_hybrid` of transformers. Layers of Gated DeltaNet normalise what their two
parts read; those of attention, where `attention.head_count_kv` is not 0, what the parts return.
"""

from __future__ import annotations

from typing import Any

from . import delta
from .blocks import attend, gated_mlp, queries_keys_values
from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters
from .rope import rotate_both

ARCHITECTURE = "olmo-hybrid"

#: The epsilon of the norm behind the recurrence, fixed in the reference.
OUTPUT_EPS = 1e-5


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    eps = p.number("attention.layer_norm_rms_epsilon")
    h = g.embedding(w.token_embd, width=p.count("embedding_length"))
    for i, key_heads in enumerate(p.per_layer("attention.head_count_kv", p.count("block_count"))):
        blk = w.blk[i]
        if key_heads:
            y = _attention(g, p, w, i, h, key_heads)
            h = g.add(h, g.rms_norm(y, blk.post_attention_norm, eps=eps))
            h = g.add(h, g.rms_norm(_mlp(g, p, blk, h), blk.post_ffw_norm, eps=eps))
        else:
            x = g.rms_norm(h, blk.attn_norm, eps=eps)
            h = g.add(h, delta.mixer(g, p, blk, i, x, eps=OUTPUT_EPS))
            h = g.add(h, _mlp(g, p, blk, g.rms_norm(h, blk.ffn_norm, eps=eps)))
    return logits(g, h, w, eps)


def _attention(g: Graph, p: Hyperparameters, w: Any, i: int, x: Value, key_heads: int) -> Value:
    """x: the residual stream (T, D). Returns (T, D).

    Norms run over the queries of all heads together, and over their keys. A file that turns heads
    says how many values of each, `rope.dimension_count`.
    """
    blk, eps = w.blk[i], p.number("attention.layer_norm_rms_epsilon")
    heads, d_head = p.count("attention.head_count"), p.count("attention.key_length")
    widths = heads * d_head, key_heads * d_head, key_heads * d_head
    q, k, v = queries_keys_values(g, blk, x, *widths)
    q, k = (g.rms_norm(y, n, eps=eps) for y, n in ((q, blk.attn_q_norm), (k, blk.attn_k_norm)))
    if turned := p.count("rope.dimension_count", 0, least=0):
        q, k = rotate_both(g, p, w, q, k, heads=heads, key_heads=key_heads, count=turned)
    y = attend(g, i, q, k, v, heads=heads, key_heads=key_heads, scale=d_head**-0.5)
    return g.linear(y, blk.attn_output, width=p.count("embedding_length"))


def _mlp(g: Graph, p: Hyperparameters, blk: Any, x: Value) -> Value:
    d_model, d_ff = p.count("embedding_length"), p.count("feed_forward_length")
    return gated_mlp(g, x, blk, width=d_ff, d_model=d_model)
