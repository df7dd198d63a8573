"""Kimi Delta Attention: a delta rule whose state forgets at another rate for every key channel.

Source: arXiv 2510.26692, and the models `kimi_linear` and `bailing_hybrid` of transformers. Forget
gate and output gate come from a matrix, or from two with a narrow row between them.
"""

from __future__ import annotations

from typing import Any

from ..kernels.recurrence import GROUPED
from .graph import Graph, Value
from .hyperparameters import Hyperparameters

#: The epsilon under the root of the L2 norm of queries and keys, fixed in the reference.
L2_EPS = 1e-6


def mixer(g: Graph, p: Hyperparameters, blk: Any, i: int, x: Value, *, safe: bool) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D).

    safe: whether decays have a lower bound where the file does not say it.
    """
    heads = p.heads(i)
    d_head = p.count("kda.head_dim")
    d_inner = heads * d_head
    eps = p.number("attention.layer_norm_rms_epsilon")

    q, k, v = _queries_keys_values(g, p, blk, i, x, d_inner)
    q = g.l2_norm(q, eps=L2_EPS, groups=heads, scale=d_head**-0.5)
    k = g.l2_norm(k, eps=L2_EPS, groups=heads, scale=1.0)
    beta = g.sigmoid(g.linear(x, blk.ssm_beta, width=heads))
    f = _projected(g, x, blk.ssm_f_a, blk.ssm_f_b, d_head, d_inner)
    if p.flag("kda.safe_gate", safe):
        bound = -p.negative("kda.gate_lower_bound")
        rates = None
        decay = g.bounded_decay(f, blk.ssm_a, blk.ssm_dt.bias, bound=bound, heads=heads)
    else:
        rates = blk.ssm_a
        decay = g.softplus(f, blk.ssm_dt.bias)

    state = g.state(f"blk.{i}.ssm", heads, d_head, d_head)
    o = g.recurrence(
        q, k, v, decay, beta, state, rates,
        heads=heads, key_heads=heads, mapping=GROUPED, decay="key", erase="tied",
    )  # fmt: skip
    gate = _projected(g, x, blk.ssm_g_a, blk.ssm_g_b, d_head, d_inner)
    o = g.gated(g.rms_norm(o, blk.ssm_norm, eps=eps, groups=heads), gate)
    return g.linear(o, blk.attn_output, width=p.count("embedding_length"))


def _queries_keys_values(
    g: Graph, p: Hyperparameters, blk: Any, i: int, x: Value, d_inner: int
) -> list[Value]:
    """Three projections, or one of them all, each with a short convolution behind it."""
    if blk.attn_qkv.find():
        parts = g.split(g.linear(x, blk.attn_qkv, width=3 * d_inner), *[d_inner] * 3)
    else:
        matrices = (blk.attn_q, blk.attn_k, blk.attn_v)
        parts = [g.linear(x, matrix, width=d_inner) for matrix in matrices]
    taps = p.count("ssm.conv_kernel")
    filters = (blk.ssm_conv1d_q, blk.ssm_conv1d_k, blk.ssm_conv1d_v)
    windows = [g.state(f"blk.{i}.conv_{part}", taps - 1, d_inner) for part in "qkv"]
    return [
        g.causal_conv(part, window, weight, taps=taps, silu=1)
        for part, window, weight in zip(parts, windows, filters, strict=True)
    ]


def _projected(g: Graph, x: Value, a: Any, b: Any, narrow: int, wide: int) -> Value:
    """W_b W_a x, or W_a x where the file has no W_b."""
    if b.find() is None:
        return g.linear(x, a, width=wide)
    return g.linear(g.linear(x, a, width=narrow), b, width=wide)
