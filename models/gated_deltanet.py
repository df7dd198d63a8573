"""Gated DeltaNet: its mixer and a gated MLP in every layer, no attention (arXiv 2412.06464)."""

from __future__ import annotations

from typing import Any

from . import delta
from .blocks import gated_mlp
from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters

ARCHITECTURE = "gated-deltanet"


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    d_model = p.count("embedding_length")
    d_ff = p.count("feed_forward_length")
    eps = p.number("attention.layer_norm_rms_epsilon")
    h = g.embedding(w.token_embd, width=d_model)
    for i in range(p.count("block_count")):
        blk = w.blk[i]
        h = g.add(h, delta.mixer(g, p, blk, i, g.rms_norm(h, blk.attn_norm, eps=eps), eps=eps))
        x = g.rms_norm(h, blk.ffn_norm, eps=eps)
        y = gated_mlp(g, x, blk.ffn_gate, blk.ffn_up, blk.ffn_down, width=d_ff, d_model=d_model)
        h = g.add(h, y)
    return logits(g, h, w, eps)
