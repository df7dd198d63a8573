"""Kimi Delta Attention: a delta rule whose state forgets at another rate for every key channel.

Source: arXiv 2510.26692, `kimi_linear` and `bailing_hybrid` of transformers, and the model `kda` of
flash-linear-attention, whose layers are otherwise those of its Gated DeltaNet. Forget gate and
output gate come from a matrix, or from two with a narrow row between them.
"""

from __future__ import annotations

from typing import Any

from ..kernels.recurrence import GROUPED
from . import gated_deltanet
from .blocks import queries_keys_values
from .delta import L2_EPS
from .graph import Graph, Value
from .hyperparameters import Hyperparameters

ARCHITECTURE = "kda"


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    return gated_deltanet.trunk(g, p, w, lambda blk, i, x: mixer(g, p, blk, i, x, safe=False))


def mixer(g: Graph, p: Hyperparameters, blk: Any, i: int, x: Value, *, safe: bool) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D).

    safe: whether decays have a lower bound where the file does not say it.
    """
    heads, d_key = p.heads(i), p.count("kda.head_dim")
    key_heads = p.count("ssm.group_count", heads)
    d_inner = p.count("ssm.inner_size", heads * d_key)
    d_value = p.divide(d_inner, "attention.head_count", heads)
    eps = p.number("attention.layer_norm_rms_epsilon")

    parts = queries_keys_values(g, blk, x, *2 * [key_heads * d_key], d_inner)
    q, k, v = _convolved(g, p, blk, i, parts)
    q = g.l2_norm(q, eps=L2_EPS, groups=key_heads, scale=d_key**-0.5)
    k = g.l2_norm(k, eps=L2_EPS, groups=key_heads, scale=1.0)
    strongest = 2.0 if p.flag("ssm.allow_neg_eigval", False) else 1.0
    beta = g.sigmoid(g.linear(x, blk.ssm_beta, width=heads), scale=strongest)
    f = _projected(g, x, blk.ssm_f_a, blk.ssm_f_b, d_value, heads * d_key)
    if p.flag("kda.safe_gate", safe):
        bound = -p.negative("kda.gate_lower_bound")
        rates = None
        decay = g.bounded_decay(f, blk.ssm_a, blk.ssm_dt.bias, bound=bound, heads=heads)
    else:
        rates = blk.ssm_a
        decay = g.softplus(f, blk.ssm_dt.bias)

    state = g.state(f"blk.{i}.ssm", heads, d_key, d_value)
    o = g.recurrence(
        q, k, v, decay, beta, state, rates,
        heads=heads, key_heads=key_heads, mapping=GROUPED, decay="key", erase="tied",
    )  # fmt: skip
    gate = _projected(g, x, blk.ssm_g_a, blk.ssm_g_b, d_value, d_inner)
    o = g.gated(g.rms_norm(o, blk.ssm_norm, eps=eps, groups=heads), gate)
    return g.linear(o, blk.attn_output, width=p.count("embedding_length"))


def _convolved(g: Graph, p: Hyperparameters, blk: Any, i: int, parts: list[Value]) -> list[Value]:
    """Queries, keys and values, each through a short convolution where the model has those."""
    taps = p.count("ssm.conv_kernel", None)
    if taps is None:
        return [g.silu(part) for part in parts]
    filters = (blk.ssm_conv1d_q, blk.ssm_conv1d_k, blk.ssm_conv1d_v)
    names = (f"blk.{i}.conv_{part}" for part in "qkv")
    return [
        g.causal_conv(part, g.state(name, taps - 1, part.width), weight, taps=taps, silu=1)
        for part, name, weight in zip(parts, names, filters, strict=True)
    ]


def _projected(g: Graph, x: Value, a: Any, b: Any, narrow: int, wide: int) -> Value:
    """W_b W_a x, or W_a x where the file has no W_b."""
    if b.find() is None:
        return g.linear(x, a, width=wide)
    return g.linear(g.linear(x, a, width=narrow), b, width=wide)
