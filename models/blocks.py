"""Blocks that hybrids share: gated MLPs, mixtures of experts, attention over KV pages."""

from __future__ import annotations

from typing import Any

from .graph import Graph, Value


def gated_mlp(
    g: Graph, x: Value, gate: Any, up: Any, down: Any, *, width: int, d_model: int
) -> Value:
    """W_down (silu(W_gate x) * W_up x). x: (T, D). Returns (T, D)."""
    y = g.swiglu(g.linear(x, gate, width=width), g.linear(x, up, width=width))
    return g.linear(y, down, width=d_model)


def mixture(g: Graph, x: Value, blk: Any, *, used: int, width: int, d_model: int) -> Value:
    """Gated MLPs of the `used` experts that the router likes best. x: (T, D). Returns (T, D).

    Strengths are the softmax over the scores of those that were chosen.
    """
    experts = blk.ffn_gate_inp.tensor().shape[0]
    routes = g.route(g.linear(x, blk.ffn_gate_inp, width=experts), used=used)
    sizes = {"used": used, "experts": experts}
    gate = g.expert_linear(x, routes, blk.ffn_gate_exps, width=width, **sizes)
    up = g.expert_linear(x, routes, blk.ffn_up_exps, width=width, **sizes)
    return g.expert_sum(g.swiglu(gate, up), routes, blk.ffn_down_exps, width=d_model, **sizes)


def attend(
    g: Graph, i: int, q: Value, k: Value, v: Value, *, heads: int, key_heads: int, scale: float
) -> Value:
    """Causal attention of layer i, its keys and values kept in the pages. Returns (T, heads V)."""
    keys, values = g.cache(f"blk.{i}.k", k.width), g.cache(f"blk.{i}.v", v.width)
    g.store(k, keys)
    g.store(v, values)
    return g.attention(q, keys, values, heads=heads, key_heads=key_heads, scale=scale)
