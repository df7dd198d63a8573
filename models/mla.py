"""Multi-head latent attention: one short row a token stands for the keys and values of all heads.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1. Queries are brought to where the rows live
(absorbed), so that keys and values are never written out; files of an older form, which have both
projections in one matrix, keep them in full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..kernels.errors import InvalidFile
from .blocks import attend, attend_latent, head_linear
from .graph import Graph, Value
from .hyperparameters import Hyperparameters

#: The epsilon of the norms of latent rows, whatever that of the others is.
LATENT_EPS = 1e-6


def latent_attention(
    g: Graph,
    p: Hyperparameters,
    blk: Any,
    i: int,
    x: Value,
    turn: Callable[[Value, int], Value] | None,
) -> Value:
    """x: the normalised residual stream (T, D). Returns what layer i adds to it, (T, D).

    turn: rotates those parts of queries and keys that know their position, of so many heads; None
    where none do. Raises InvalidFile for sizes that leave nothing of a head but that part.
    """
    heads = p.heads(i)
    d_latent, d_turned = p.count("attention.kv_lora_rank"), p.count("rope.dimension_count")
    d_head, d_value = p.count("attention.key_length_mla"), p.count("attention.value_length_mla")
    d_plain = d_head - d_turned
    if d_plain < 1:
        raise InvalidFile(
            f"{p.path}: {p.architecture}.attention.key_length_mla is {d_head}, no more than "
            f"rope.dimension_count, {d_turned}; the file is damaged"
        )

    q = _queries(g, p, blk, x, heads * d_head)
    plain = g.columns(q, groups=heads, start=0, width=d_plain)
    turned = g.columns(q, groups=heads, start=d_plain, width=d_turned)
    row = g.linear(x, blk.attn_kv_a_mqa, width=d_latent + d_turned)
    latent, position = g.split(row, d_latent, d_turned)
    latent = g.rms_norm(latent, blk.attn_kv_a_norm, eps=LATENT_EPS)
    if turn:
        turned, position = turn(turned, heads), turn(position, 1)

    scale = d_head**-0.5
    if blk.attn_kv_b.find():
        both = g.linear(latent, blk.attn_kv_b, width=heads * (d_plain + d_value))
        k = g.columns(both, groups=heads, start=0, width=d_plain)
        v = g.columns(both, groups=heads, start=d_plain, width=d_value)
        q, k = (
            g.join(part, more, groups=heads)
            for part, more in ((plain, turned), (k, _repeated(g, position, heads)))
        )
        y = attend(g, i, q, k, v, heads=heads, key_heads=heads, scale=scale)
    else:
        q = head_linear(g, plain, blk.attn_k_b, width=d_latent, heads=heads)
        q, rows = g.join(q, turned, groups=heads), g.join(latent, position, groups=1)
        y = attend_latent(g, i, q, rows, heads=heads, d_value=d_latent, scale=scale)
        y = head_linear(g, y, blk.attn_v_b, width=d_value, heads=heads)
    if blk.attn_gate.find():
        y = g.gated(y, g.linear(x, blk.attn_gate, width=heads))
    return g.linear(y, blk.attn_output, width=p.count("embedding_length"))


def _queries(g: Graph, p: Hyperparameters, blk: Any, x: Value, width: int) -> Value:
    """Queries of all heads, (T, width); of some models they come from a short row as well."""
    if not blk.attn_q_a.find():
        return g.linear(x, blk.attn_q, width=width)
    row = g.linear(x, blk.attn_q_a, width=p.count("attention.q_lora_rank"))
    return g.linear(g.rms_norm(row, blk.attn_q_a_norm, eps=LATENT_EPS), blk.attn_q_b, width=width)


def _repeated(g: Graph, x: Value, times: int) -> Value:
    """x side by side so many times: (T, D) -> (T, times * D)."""
    whole = x
    while whole.width < times * x.width:
        part = min(whole.width, times * x.width - whole.width)
        whole = g.join(whole, g.split(whole, part, whole.width - part)[0], groups=1)
    return whole
