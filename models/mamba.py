"""Mamba-1: a selective scan over channels (arXiv 2312.00752), and Falcon-Mamba."""

from __future__ import annotations

from typing import Any

from .graph import Graph, Value
from .head import logits
from .hyperparameters import Hyperparameters

ARCHITECTURE = "mamba"


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    d_model = p.count("embedding_length")
    d_inner = p.count("ssm.inner_size")
    d_state = p.count("ssm.state_size")
    dt_rank = p.count("ssm.time_step_rank")
    taps = p.count("ssm.conv_kernel")
    eps = p.number("attention.layer_norm_rms_epsilon")
    normalised = p.flag("ssm.dt_b_c_rms", False)
    mixer_eps = p.number("ssm.dt_b_c_rms_epsilon", eps)

    h = g.embedding(w.token_embd, width=d_model)
    for i in range(p.count("block_count")):
        blk = w.blk[i]
        xz = g.linear(g.rms_norm(h, blk.attn_norm, eps=eps), blk.ssm_in, width=2 * d_inner)
        x, z = g.split(xz, d_inner, d_inner)
        window = g.state(f"blk.{i}.conv", taps - 1, d_inner)
        x = g.causal_conv(x, window, blk.ssm_conv1d, taps=taps, silu=1)

        dbc = g.linear(x, blk.ssm_x, width=dt_rank + 2 * d_state)
        dt, b, c = g.split(dbc, dt_rank, d_state, d_state)
        if normalised:
            dt, b, c = (g.rms_norm(part, eps=mixer_eps) for part in (dt, b, c))
        dt = g.softplus(g.linear(dt, blk.ssm_dt, width=d_inner))

        state = g.state(f"blk.{i}.ssm", d_state, d_inner)
        y = g.selective_scan(x, dt, b, c, state, blk.ssm_a, blk.ssm_d, d_state=d_state)
        h = g.add(h, g.linear(g.swiglu(z, y), blk.ssm_out, width=d_model))
    return logits(g, h, w, eps)
