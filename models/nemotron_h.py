"""Nemotron-H and Nemotron-3: layers of Mamba-2, of attention, of an MLP or of experts.

Source: arXiv 2504.03624, arXiv 2512.20848, and the model `nemotron_h` of transformers. Every layer
has one of them alone, an MLP or experts where `feed_forward_length` is not 0 for it, attention
where `attention.head_count_kv` is not. Activations are ReLU squared, and nothing knows positions.
"""

from __future__ import annotations

from typing import Any

from ..kernels.experts import SIGMOID
from . import mamba2
from .blocks import attend, layers_of, mixture, queries_keys_values
from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters

ARCHITECTURES = ("nemotron_h", "nemotron_h_moe")

#: What is added to the sum that strengths of experts are divided by, fixed in the reference.
ROUTER_EPS = 1e-20


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    eps = p.number("attention.layer_norm_rms_epsilon", p.number("attention.layer_norm_epsilon"))
    blocks = p.count("block_count")
    widths = p.per_layer("feed_forward_length", blocks)
    key_heads = p.per_layer("attention.head_count_kv", blocks)
    h = g.embedding(w.token_embd, width=p.count("embedding_length"))
    for i in range(layers_of(p, w)):
        blk = w.blk[i]
        x = g.rms_norm(h, blk.attn_norm, eps=eps)
        if widths[i]:
            y = _feed_forward(g, p, blk, i, x, widths[i])
        elif key_heads[i]:
            y = _attention(g, p, blk, i, x, key_heads[i])
        else:
            y = mamba2.mixer(g, p, blk, i, x, eps=eps)
        h = g.add(h, y)
    return logits(g, h, w, eps)


def _attention(g: Graph, p: Hyperparameters, blk: Any, i: int, x: Value, key_heads: int) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D)."""
    d_model, d_head = p.count("embedding_length"), p.count("attention.key_length")
    d_value = p.count("attention.value_length", d_head)
    heads = p.heads(i)
    widths = heads * d_head, key_heads * d_head, key_heads * d_value
    q, k, v = queries_keys_values(g, blk, x, *widths)
    y = attend(g, i, q, k, v, heads=heads, key_heads=key_heads, scale=d_head**-0.5)
    return g.linear(y, blk.attn_output, width=d_model)


def _feed_forward(g: Graph, p: Hyperparameters, blk: Any, i: int, x: Value, width: int) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D)."""
    d_model = p.count("embedding_length")
    if not blk.ffn_gate_inp.find():
        return _mlp(g, x, blk.ffn_up, blk.ffn_down, width, d_model)
    shared = p.count("expert_shared_feed_forward_length")
    y = _mlp(g, x, blk.ffn_up_shexp, blk.ffn_down_shexp, shared, d_model)
    return g.add(_experts(g, p, blk, i, x), y)


def _mlp(g: Graph, x: Value, up: Any, down: Any, width: int, d_model: int) -> Value:
    """W_down max(W_up x, 0)^2. x: (T, D). Returns (T, D)."""
    return g.linear(g.relu_squared(g.linear(x, up, width=width)), down, width=d_model)


def _experts(g: Graph, p: Hyperparameters, blk: Any, i: int, x: Value) -> Value:
    """Experts on x, or on fewer numbers that stand for it; the router always reads x itself."""
    blocks, d_model = p.count("block_count"), p.count("embedding_length")
    latent = p.count("moe_latent_size", None)
    scores = g.linear(x, blk.ffn_gate_inp, width=p.count("expert_count"))
    y = x if latent is None else g.linear(x, blk.ffn_latent_down, width=latent)
    y = mixture(
        g, y, blk, scores=scores, d_model=latent or d_model,
        used=p.per_layer("expert_used_count", blocks)[i],
        width=p.per_layer("expert_feed_forward_length", blocks)[i],
        gating=SIGMOID, eps=ROUTER_EPS,
        normalise=int(p.flag("expert_weights_norm", False)),
        scale=p.number("expert_weights_scale", 1.0),
        groups=p.count("expert_group_count", 1),
        groups_used=p.count("expert_group_used_count", 1),
    )  # fmt: skip
    return y if latent is None else g.linear(y, blk.ffn_latent_up, width=d_model)
