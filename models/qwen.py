"""Qwen3-Next and Qwen3.5 to 3.8: Gated DeltaNet layers, one of gated attention after a few of
them, and a gated MLP or experts behind each.

Source: the models `qwen3_next`, `qwen3_5` and `qwen3_5_moe` of transformers.
"""

from __future__ import annotations

from typing import Any

from ..kernels.recurrence import GROUPED, TILED
from . import delta
from .blocks import attend, gated_mlp, layers_of, mixture, queries_keys_values
from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters
from .rope import rotate_both

ARCHITECTURES = ("qwen3next", "qwen35", "qwen35moe")


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    eps = p.number("attention.layer_norm_rms_epsilon")
    # Only the files of Qwen3-Next keep the value heads as checkpoints have them.
    mapping = GROUPED if p.architecture == "qwen3next" else TILED
    # Older files only say how often a layer is one of attention.
    recurrent = p.flags("attention.recurrent_layers", p.count("block_count"))
    interval = p.count("full_attention_interval", 4)
    h = g.embedding(w.token_embd, width=p.count("embedding_length"))
    for i in range(layers_of(p, w)):
        blk = w.blk[i]
        x = g.rms_norm(h, blk.attn_norm, eps=eps)
        if recurrent[i] if recurrent else (i + 1) % interval:
            y = delta.mixer(g, p, blk, i, x, eps=eps, mapping=mapping)
        else:
            y = _attention(g, p, w, i, x)
        h = g.add(h, y)
        h = g.add(h, _feed_forward(g, p, blk, g.rms_norm(h, blk.post_attention_norm, eps=eps)))
    return logits(g, h, w, eps)


def _attention(g: Graph, p: Hyperparameters, w: Any, i: int, x: Value) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D)."""
    blk, d_model = w.blk[i], p.count("embedding_length")
    heads = p.count("attention.head_count")
    key_heads = p.count("attention.head_count_kv", heads)
    d_head = p.count("attention.key_length")
    turned = p.count("rope.dimension_count", d_head)
    eps = p.number("attention.layer_norm_rms_epsilon")

    widths = 2 * heads * d_head, key_heads * d_head, key_heads * d_head
    mixed, k, v = queries_keys_values(g, blk, x, *widths)
    # Of every head first the query, then a gate for each value.
    q, gate = (g.columns(mixed, groups=heads, start=at, width=d_head) for at in (0, d_head))
    q = g.rms_norm(q, blk.attn_q_norm, eps=eps, groups=heads)
    k = g.rms_norm(k, blk.attn_k_norm, eps=eps, groups=key_heads)
    q, k = rotate_both(g, p, w, q, k, heads=heads, key_heads=key_heads, count=turned)
    y = attend(g, i, q, k, v, heads=heads, key_heads=key_heads, scale=d_head**-0.5)
    return g.linear(g.gated(y, gate), blk.attn_output, width=d_model)


def _feed_forward(g: Graph, p: Hyperparameters, blk: Any, x: Value) -> Value:
    """x: the normalised residual stream (T, D). Returns what is added to it, (T, D)."""
    d_model = p.count("embedding_length")
    if not blk.ffn_gate_inp.find():
        d_ff = p.count("feed_forward_length")
        return gated_mlp(g, x, blk, width=d_ff, d_model=d_model)
    used, d_expert = p.count("expert_used_count"), p.count("expert_feed_forward_length")
    y = mixture(g, x, blk, used=used, width=d_expert, d_model=d_model)
    width = p.count("expert_shared_feed_forward_length")
    shared = gated_mlp(g, x, blk, width=width, d_model=d_model, suffix="_shexp")
    return g.add(y, g.gated(shared, g.linear(x, blk.ffn_gate_inp_shexp, width=1)))
