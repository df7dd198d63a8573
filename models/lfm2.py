"""LFM2: short convolutions between two gates, and a few layers of attention.

Source: the models `lfm2` and `lfm2_moe` of transformers. A layer is one of attention where
`attention.head_count_kv` is not 0 for it; all have an MLP or experts behind them.
"""

from __future__ import annotations

from typing import Any

from ..kernels.experts import SIGMOID
from .blocks import attend, gated_mlp, mixture, queries_keys_values
from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters
from .rope import rotate_both

ARCHITECTURES = ("lfm2", "lfm2moe")

#: Added to the sum that the strengths of the chosen experts are divided by.
ROUTER_EPS = 1e-6


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    eps = p.number("attention.layer_norm_rms_epsilon")
    layers = p.count("block_count")
    h = g.embedding(w.token_embd, width=p.count("embedding_length"))
    for i, key_heads in enumerate(p.per_layer("attention.head_count_kv", layers)):
        blk = w.blk[i]
        x = g.rms_norm(h, blk.attn_norm, eps=eps)
        y = _attention(g, p, w, i, x, key_heads) if key_heads else _short_conv(g, p, blk, i, x)
        h = g.add(h, y)
        h = g.add(h, _feed_forward(g, p, blk, g.rms_norm(h, blk.ffn_norm, eps=eps)))
    return logits(g, h, w, eps, norm=w.token_embd_norm)


def _short_conv(g: Graph, p: Hyperparameters, blk: Any, i: int, x: Value) -> Value:
    """C * conv(B * x'), of the three parts that x is projected to. x: (T, D). Returns (T, D)."""
    d_model, taps = p.count("embedding_length"), p.count("shortconv.l_cache")
    bcx = g.linear(x, blk.shortconv.in_proj, width=3 * d_model)
    b, c, x = g.split(bcx, d_model, d_model, d_model)
    window = g.state(f"blk.{i}.conv", taps - 1, d_model)
    y = g.causal_conv(g.multiply(b, x), window, blk.shortconv.conv, taps=taps, silu=0)
    return g.linear(g.multiply(c, y), blk.shortconv.out_proj, width=d_model)


def _attention(g: Graph, p: Hyperparameters, w: Any, i: int, x: Value, key_heads: int) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D)."""
    blk, d_model = w.blk[i], p.count("embedding_length")
    eps = p.number("attention.layer_norm_rms_epsilon")
    heads = p.count("attention.head_count")
    d_head = p.head_width(heads)
    widths = heads * d_head, key_heads * d_head, key_heads * d_head
    q, k, v = queries_keys_values(g, blk, x, *widths)
    q = g.rms_norm(q, blk.attn_q_norm, eps=eps, groups=heads)
    k = g.rms_norm(k, blk.attn_k_norm, eps=eps, groups=key_heads)
    turned = p.count("rope.dimension_count", d_head)
    q, k = rotate_both(g, p, w, q, k, heads=heads, key_heads=key_heads, count=turned)
    y = attend(
        g, i, q, k, v, heads=heads, key_heads=key_heads, scale=d_head**-0.5,
        window=p.count("attention.sliding_window", 0, least=0),
    )  # fmt: skip
    return g.linear(y, blk.attn_output, width=d_model)


def _feed_forward(g: Graph, p: Hyperparameters, blk: Any, x: Value) -> Value:
    """x: the normalised residual stream (T, D). Returns what is added to it, (T, D)."""
    d_model, d_ff = p.count("embedding_length"), p.count("feed_forward_length")
    if not blk.ffn_gate_inp.find():
        return gated_mlp(g, x, blk, width=d_ff, d_model=d_model)
    return mixture(
        g, x, blk, used=p.count("expert_used_count"), d_model=d_model,
        width=p.count("expert_feed_forward_length"), gating=SIGMOID, eps=ROUTER_EPS,
        normalise=int(p.flag("expert_weights_norm", True)),
        scale=p.number("expert_weights_scale", 1.0),
    )  # fmt: skip
