"""Blocks that hybrids share: layers, MLPs, mixtures of experts, attention over KV pages."""

from __future__ import annotations

from typing import Any

from ..kernels.errors import InvalidFile
from .graph import Graph, Value
from .hyperparameters import Hyperparameters


def layers_of(p: Hyperparameters, w: Any) -> int:
    """How many layers the model has.

    Behind them a file may hold some that guess further tokens (MTP), which stay unread. Raises
    InvalidFile for a file that has no others.
    """
    count, more = p.count("block_count"), p.count("nextn_predict_layers", 0, least=0)
    if more >= count:
        raise InvalidFile(
            f"{p.path}: {p.architecture}.nextn_predict_layers is {more}, and there are {count} "
            "layers in all; convert the model again"
        )
    w.blk.ignore(first=count - more)
    return count - more


def gated_mlp(g: Graph, x: Value, blk: Any, *, width: int, d_model: int, suffix: str = "") -> Value:
    """W_down (silu(W_gate x) * W_up x). x: (T, D). Returns (T, D).

    suffix: of the tensors' names, "_shexp" for an MLP beside experts.
    """
    gate, up, down = (getattr(blk, f"ffn_{part}{suffix}") for part in ("gate", "up", "down"))
    y = g.swiglu(g.linear(x, gate, width=width), g.linear(x, up, width=width))
    return g.linear(y, down, width=d_model)


def mixture(
    g: Graph,
    x: Value,
    blk: Any,
    *,
    used: int,
    width: int,
    d_model: int,
    scores: Value | None = None,
    **routing: Any,
) -> Value:
    """MLPs of the `used` experts that the router likes best. x: (T, D). Returns (T, D).

    Gated ones, or with a ReLU squared where the file has no gates. `scores`: the router's, where it
    reads something else than x. `routing`: attributes of the op `route`.
    """
    if scores is None:
        experts = blk.ffn_gate_inp.tensor().shape[0]
        scores = g.linear(x, blk.ffn_gate_inp, width=experts)
    routes = g.route(scores, blk.exp_probs_b.bias.find(), used=used, **routing)
    sizes = {"used": used, "experts": scores.width}
    if blk.ffn_gate_up_exps.find():
        both = g.expert_linear(x, routes, blk.ffn_gate_up_exps, width=2 * width, **sizes)
        gate, up = (g.columns(both, groups=used, start=start, width=width) for start in (0, width))
    else:
        gate = None
        if blk.ffn_gate_exps.find():
            gate = g.expert_linear(x, routes, blk.ffn_gate_exps, width=width, **sizes)
        up = g.expert_linear(x, routes, blk.ffn_up_exps, width=width, **sizes)
    y = g.relu_squared(up) if gate is None else g.swiglu(gate, up)
    y = g.expert_linear(y, routes, blk.ffn_down_exps, width=d_model, parts=used, **sizes)
    return g.expert_sum(y, routes, used=used)


def queries_keys_values(g: Graph, blk: Any, x: Value, *widths: int) -> list[Value]:
    """The projections that attention begins with, from one matrix or from three. x: (T, D)."""
    if blk.attn_qkv.find():
        return g.split(g.linear(x, blk.attn_qkv, width=sum(widths)), *widths)
    matrices = (blk.attn_q, blk.attn_k, blk.attn_v)
    return [g.linear(x, m, width=width) for m, width in zip(matrices, widths, strict=True)]


def attend(
    g: Graph,
    i: int,
    q: Value,
    k: Value,
    v: Value,
    *,
    heads: int,
    key_heads: int,
    scale: float,
    window: int = 0,
) -> Value:
    """Causal attention of layer i, its keys and values kept in the pages. Returns (T, heads V)."""
    keys = g.cache(f"blk.{i}.k", "k", key_heads, k.width // key_heads)
    values = g.cache(f"blk.{i}.v", "v", key_heads, v.width // key_heads)
    g.store(k, keys)
    g.store(v, values)
    sizes = {"heads": heads, "key_heads": key_heads}
    return g.attention(q, keys, values, scale=scale, window=window, **sizes)


def head_linear(g: Graph, x: Value, weight: Any, *, width: int, heads: int) -> Value:
    """W_h x_h, a matrix for every head. x: (T, heads K). Returns (T, heads width)."""
    sizes = {"width": width, "used": heads, "experts": heads, "parts": heads}
    return g.expert_linear(x, None, weight, **sizes)


def attend_latent(
    g: Graph, i: int, q: Value, latent: Value, *, heads: int, d_value: int, scale: float
) -> Value:
    """Attention whose heads all read one row a token (MLA, arXiv 2405.04434, absorbed).

    q: (T, heads * L). latent: (T, L), kept in the pages; its first `d_value` numbers are the value
    of every head as well. Returns (T, heads * d_value).
    """
    keys = g.cache(f"blk.{i}.k", "k", 1, latent.width)
    g.store(latent, keys)
    sizes = {"heads": heads, "key_heads": 1}
    return g.attention(q, keys, keys.first(d_value), scale=scale, **sizes)
