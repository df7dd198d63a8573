"""Mamba-1: a selective scan over channels (arXiv 2312.00752), and Falcon-Mamba."""

from __future__ import annotations

from functools import partial
from typing import Any

from .graph import Graph, Value
from .hyperparameters import Hyperparameters
from .mamba_ssm import stack

ARCHITECTURE = "mamba"


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    eps = p.number("attention.layer_norm_rms_epsilon")
    # Falcon-Mamba's norms have no weights.
    norms = (None, None, None) if p.flag("ssm.dt_b_c_rms", False) else ()
    mixer_eps = p.number("ssm.dt_b_c_rms_epsilon", eps)
    return stack(g, p, w, partial(mixer, norms=norms, eps=mixer_eps))


def mixer(
    g: Graph, p: Hyperparameters, blk: Any, i: int, x: Value, *, norms: tuple[Any, ...], eps: float
) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D).

    norms, eps: weights of the norms of dt, B and C; no weights where these are not normalised.
    """
    d_inner = p.count("ssm.inner_size")
    d_state = p.count("ssm.state_size")
    dt_rank = p.count("ssm.time_step_rank")
    taps = p.count("ssm.conv_kernel")

    x, z = g.split(g.linear(x, blk.ssm_in, width=2 * d_inner), d_inner, d_inner)
    window = g.state(f"blk.{i}.conv", taps - 1, d_inner)
    x = g.causal_conv(x, window, blk.ssm_conv1d, taps=taps, silu=1)

    dbc = g.linear(x, blk.ssm_x, width=dt_rank + 2 * d_state)
    parts = g.split(dbc, dt_rank, d_state, d_state)
    if norms:
        parts = [g.rms_norm(y, norm, eps=eps) for y, norm in zip(parts, norms, strict=True)]
    dt, b, c = parts
    dt = g.softplus(g.linear(dt, blk.ssm_dt, width=d_inner))

    state = g.state(f"blk.{i}.ssm", d_state, d_inner)
    y = g.selective_scan(x, dt, b, c, state, blk.ssm_a, blk.ssm_d, d_state=d_state)
    return g.linear(g.swiglu(z, y), blk.ssm_out, width=p.count("embedding_length"))
