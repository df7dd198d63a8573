"""What models of mamba_ssm may have beside Mamba layers: attention in a few, an MLP behind all.

Source: MHA, GatedMLP and Block of mamba_ssm. A layer is one of attention where
`attention.head_count_kv` is not 0 for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .blocks import attend, gated_mlp
from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters
from .rope import rotate_both


def stack(g: Graph, p: Hyperparameters, w: Any, mixer: Callable[..., Value]) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary).

    mixer: what a Mamba layer adds, called as `mixer(g, p, blk, i, x)` of the normalised stream x.
    """
    d_model, layers = p.count("embedding_length"), p.count("block_count")
    eps = p.number("attention.layer_norm_rms_epsilon")
    h = g.embedding(w.token_embd, width=d_model)
    for i, key_heads in enumerate(p.per_layer("attention.head_count_kv", layers, 0)):
        blk = w.blk[i]
        x = g.rms_norm(h, blk.attn_norm, eps=eps)
        h = g.add(h, _attention(g, p, w, i, x, key_heads) if key_heads else mixer(g, p, blk, i, x))
        if blk.ffn_norm.find():
            x, d_ff = g.rms_norm(h, blk.ffn_norm, eps=eps), p.count("feed_forward_length")
            y = gated_mlp(g, x, blk, width=d_ff, d_model=d_model)
            h = g.add(h, y)
    return logits(g, h, w, eps)


def _attention(g: Graph, p: Hyperparameters, w: Any, i: int, x: Value, key_heads: int) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D).

    Queries, keys and values may pass a convolution of a few taps, without an activation.
    """
    blk = w.blk[i]
    heads, d_head = p.heads(i), p.count("attention.key_length")
    widths = heads * d_head, key_heads * d_head, key_heads * d_head
    qkv = g.linear(x, blk.attn_qkv, width=sum(widths))
    if taps := p.count("shortconv.l_cache", 0, least=0):
        window = g.state(f"blk.{i}.conv", taps - 1, sum(widths))
        qkv = g.causal_conv(qkv, window, blk.shortconv.conv, taps=taps, silu=0)
    q, k, v = g.split(qkv, *widths)
    if turned := p.count("rope.dimension_count", 0, least=0):
        q, k = rotate_both(g, p, w, q, k, heads=heads, key_heads=key_heads, count=turned)
    scale = p.number("attention.scale", d_head**-0.5)
    y = attend(g, i, q, k, v, heads=heads, key_heads=key_heads, scale=scale)
    return g.linear(y, blk.attn_output, width=p.count("embedding_length"))
