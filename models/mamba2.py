"""Mamba-2: a matrix state per head, decayed by one number a token (SSD, arXiv 2405.21060)."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..kernels.norm import GATE_FIRST
from ..kernels.recurrence import GROUPED
from .graph import Graph, Value
from .hyperparameters import Hyperparameters
from .mamba_ssm import stack

ARCHITECTURE = "mamba2"


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    eps = p.number("attention.layer_norm_rms_epsilon")
    return stack(g, p, w, partial(mixer, eps=eps))


def mixer(
    g: Graph,
    p: Hyperparameters,
    blk: Any,
    i: int,
    x: Value,
    *,
    eps: float,
    order: int = GATE_FIRST,
) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D).

    eps, order: of the norm and the gate behind the recurrence; order 0 is a gate without a norm.
    """
    d_inner = p.count("ssm.inner_size")
    d_state = p.count("ssm.state_size")
    heads = p.count("ssm.time_step_rank")
    groups = p.count("ssm.group_count", 1)
    taps = p.count("ssm.conv_kernel")
    head_dim = p.divide(d_inner, "ssm.time_step_rank", heads)
    channels = d_inner + 2 * groups * d_state

    zxbcdt = g.linear(x, blk.ssm_in, width=d_inner + channels + heads)
    z, xbc, dt = g.split(zxbcdt, d_inner, channels, heads)
    window = g.state(f"blk.{i}.conv", taps - 1, channels)
    xbc = g.causal_conv(xbc, window, blk.ssm_conv1d, taps=taps, silu=1)
    x, b, c = g.split(xbc, d_inner, groups * d_state, groups * d_state)
    dt = g.softplus(dt, blk.ssm_dt.bias)

    state = g.state(f"blk.{i}.ssm", heads, d_state, head_dim)
    y = g.recurrence(
        c, b, x, dt, dt, state, blk.ssm_a, blk.ssm_d,
        heads=heads, key_heads=groups, mapping=GROUPED, decay="head", erase="none",
    )  # fmt: skip
    if order:
        y = g.rms_norm(y, blk.ssm_norm, z, eps=eps, groups=groups, order=order)
    else:
        y = g.swiglu(z, y)
    return g.linear(y, blk.ssm_out, width=p.count("embedding_length"))
