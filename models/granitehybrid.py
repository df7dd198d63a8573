"""Granite-4-H and Bamba: Mamba-2 layers, a few of attention, and an MLP or experts behind each.

Source: the models `granitemoehybrid` and `bamba` of transformers. A layer is one of attention
where `attention.head_count_kv` is not 0 for it.
"""

from __future__ import annotations

from typing import Any

from ..kernels.errors import UnsupportedModel
from ..kernels.rotary import neighbours
from . import mamba2
from .blocks import attend, gated_mlp, mixture, queries_keys_values
from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters
from .rope import speeds

ARCHITECTURE = "granitehybrid"


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    eps = p.number("attention.layer_norm_rms_epsilon")
    residual = p.number("residual_scale", 1.0)
    layers = p.count("block_count")
    h = g.embedding(w.token_embd, width=p.count("embedding_length"))
    if (scale := p.number("embedding_scale", 1.0)) != 1.0:
        h = g.scaled(h, scale=scale)
    for i, key_heads in enumerate(p.per_layer("attention.head_count_kv", layers)):
        blk = w.blk[i]
        x = g.rms_norm(h, blk.attn_norm, eps=eps)
        if key_heads:
            y = _attention(g, p, blk, i, x, key_heads)
        else:
            y = mamba2.mixer(g, p, blk, i, x, eps=eps)
        h = g.add(h, y, scale=residual)
        y = _feed_forward(g, p, blk, g.rms_norm(h, blk.ffn_norm, eps=eps))
        h = g.add(h, y, scale=residual)
    return logits(g, h, w, eps, scale=1 / p.number("logit_scale", 1.0))


def _attention(g: Graph, p: Hyperparameters, blk: Any, i: int, x: Value, key_heads: int) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D)."""
    d_model = p.count("embedding_length")
    heads = p.heads(i)
    d_head = p.head_width(heads)
    d_value = p.count("attention.value_length", d_head)
    scale = p.number("attention.scale", d_head**-0.5)
    widths = heads * d_head, key_heads * d_head, key_heads * d_value
    q, k, v = queries_keys_values(g, blk, x, *widths)
    if p.flag("rope.scaling.finetuned", True):
        turn = _rotation(p, d_head)
        q, k = g.rotary(q, heads=heads, **turn), g.rotary(k, heads=key_heads, **turn)
    y = attend(g, i, q, k, v, heads=heads, key_heads=key_heads, scale=scale)
    return g.linear(y, blk.attn_output, width=d_model)


def _rotation(p: Hyperparameters, d_head: int) -> dict[str, Any]:
    """Attributes of `rotary`.

    The pairs are transformers' (i, i + count / 2), brought side by side by the converter. Where
    only a part of a head is turned, llama.cpp's converter has rearranged the whole head all the
    same: value i of the first half lies at 2 i.
    """
    count = p.count("rope.dimension_count", d_head)
    rearranged = p.count("rope.rearranged_count", d_head)
    pairs = neighbours(count)
    if count != rearranged:
        if 2 * count > rearranged:
            raise UnsupportedModel(
                f"{p.path}: {p.architecture}.rope.dimension_count is {count}; keelback turns whole "
                f"heads of {rearranged} values, or up to half of each"
            )
        pairs = {"count": count, "step": 2, "gap": count}
    return {**pairs, **speeds(p, count)}


def _feed_forward(g: Graph, p: Hyperparameters, blk: Any, x: Value) -> Value:
    """x: the normalised residual stream (T, D). Returns what is added to it, (T, D)."""
    d_model, d_ff = p.count("embedding_length"), p.count("feed_forward_length")
    if not blk.ffn_gate_inp.find():
        return gated_mlp(g, x, blk, width=d_ff, d_model=d_model)
    y = mixture(g, x, blk, used=p.count("expert_used_count"), width=d_ff, d_model=d_model)
    if not blk.ffn_gate_shexp.find():
        return y
    width = p.count("expert_shared_feed_forward_length")
    shared = gated_mlp(g, x, blk, width=width, d_model=d_model, suffix="_shexp")
    return g.add(y, shared)
