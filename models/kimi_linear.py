"""Kimi Linear: layers of delta attention, some of latent attention, and experts behind each.

Source: arXiv 2510.26692, and the model `kimi_linear` of transformers. A layer is one of attention
where `attention.head_count_kv` is not 0 for it. No layer is told positions: recurrences know them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..kernels.errors import UnsupportedModel
from ..kernels.experts import SIGMOID, SOFTMAX
from . import kda
from .blocks import gated_mlp, layers_of, mixture
from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters
from .mla import latent_attention

ARCHITECTURE = "kimi-linear"

#: `expert_gating_func`, as GGUF numbers what makes strengths of scores.
_GATINGS = {1: SOFTMAX, 2: SIGMOID}


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    return trunk(g, p, w, safe=False)


def trunk(
    g: Graph,
    p: Hyperparameters,
    w: Any,
    *,
    safe: bool,
    turn: Callable[[Value, int], Value] | None = None,
) -> Value:
    """All of the model; safe: of `kda.mixer`, turn: of `latent_attention`."""
    eps = p.number("attention.layer_norm_rms_epsilon")
    attends = p.per_layer("attention.head_count_kv", p.count("block_count"))
    h = g.embedding(w.token_embd, width=p.count("embedding_length"))
    for i in range(layers_of(p, w)):
        blk = w.blk[i]
        x = g.rms_norm(h, blk.attn_norm, eps=eps)
        if attends[i]:
            y = latent_attention(g, p, blk, i, x, turn)
        else:
            y = kda.mixer(g, p, blk, i, x, safe=safe)
        h = g.add(h, y)
        h = g.add(h, _feed_forward(g, p, blk, g.rms_norm(h, blk.ffn_norm, eps=eps)))
    return logits(g, h, w, eps)


def _feed_forward(g: Graph, p: Hyperparameters, blk: Any, x: Value) -> Value:
    """An MLP in the first layers, experts in the others. x: (T, D). Returns (T, D)."""
    d_model = p.count("embedding_length")
    if not blk.ffn_gate_inp.find():
        d_ff = p.count("feed_forward_length")
        return gated_mlp(g, x, blk, width=d_ff, d_model=d_model)
    gating = p.count("expert_gating_func")
    if gating not in _GATINGS:
        raise UnsupportedModel(
            f"{p.path}: {p.architecture}.expert_gating_func is {gating}; keelback runs routers "
            "with softmax (1) and sigmoid (2)"
        )
    d_ff = p.count("expert_feed_forward_length")
    groups = p.count("expert_group_count", 1)
    groups_used = p.count("expert_group_used_count", groups) if groups > 1 else 1
    y = mixture(
        g, x, blk, used=p.count("expert_used_count"), width=d_ff, d_model=d_model,
        gating=_GATINGS[gating], normalise=int(p.flag("expert_weights_norm", True)), eps=1e-20,
        scale=p.number("expert_weights_scale", 1.0),
        groups=groups, groups_used=groups_used,
    )  # fmt: skip
    if not blk.ffn_gate_shexp.find():
        return y
    width = d_ff * p.count("expert_shared_count", 1)
    width = p.count("expert_shared_feed_forward_length", width)
    return g.add(y, gated_mlp(g, x, blk, width=width, d_model=d_model, suffix="_shexp"))
