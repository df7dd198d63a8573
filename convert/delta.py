"""The mixer of Gated DeltaNet, as every model that has it keeps it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .checkpoint import Checkpoint
from .plan import Part, Plan, negative_exp

#: What flash-linear-attention calls the parts of a mixer, by their names in a GGUF file.
FLA = {
    "attn_qkv": ("q_proj", "k_proj", "v_proj"), "attn_gate": ("g_proj",),
    "ssm_conv1d": ("q_conv1d", "k_conv1d", "v_conv1d"), "ssm_alpha": ("a_proj",),
    "ssm_beta": ("b_proj",), "ssm_norm": ("o_norm",), "ssm_out": ("o_proj",),
}  # fmt: skip


def add_mixer(
    result: Plan,
    checkpoint: Checkpoint,
    mixer: str,
    blk: str,
    names: Mapping[str, tuple[str, ...]],
    tile: bool = True,
) -> None:
    """Add what `names` has of a mixer: the checkpoint's names, by those of the GGUF file.

    Queries, keys and values may lie in one tensor or three. tile: take value heads, of which each
    key head has some in a row, in turn from all key heads, as llama.cpp does it.
    """
    keys = result.keys
    d_model, heads, d_inner = (
        keys[key] for key in ("embedding_length", "ssm.time_step_rank", "ssm.inner_size")
    )

    def need(gguf: str, *shape: int):
        (name,) = names[gguf]
        return checkpoint.require(f"{mixer}.{name}.weight", *shape)

    # First of all: what config says of sizes is true only if the tensors have them.
    a_log = checkpoint.require(f"{mixer}.A_log", heads)
    out = need("ssm_out", d_model, d_inner)
    key_heads = keys["ssm.group_count"] if tile else heads
    by_head, by_row = (tiled(key_heads, heads, width) for width in (1, d_inner // heads))
    for gguf, columns in (("attn_qkv", d_model), ("ssm_conv1d", keys.get("ssm.conv_kernel", 0))):
        if gguf in names:
            parts = _channels(checkpoint, mixer, names[gguf], keys, columns, by_row)
            result.add(f"{blk}.{gguf}.weight", (sum(p.count for p in parts), columns), *parts)
    for gguf, rows, order in (
        ("attn_gate", d_inner, by_row), ("ssm_alpha", heads, by_head), ("ssm_beta", heads, by_head),
    ):  # fmt: skip
        if gguf in names:
            part = Part(need(gguf, rows, d_model), rows=order)
            result.add(f"{blk}.{gguf}.weight", (rows, d_model), part)
    result.add(f"{blk}.ssm_a", (heads,), Part(a_log, columns=by_head, function=negative_exp))
    dt_bias = checkpoint.require(f"{mixer}.dt_bias", heads)
    result.add(f"{blk}.ssm_dt.bias", (heads,), Part(dt_bias, columns=by_head))
    d_value = d_inner // heads
    result.add(f"{blk}.ssm_norm.weight", (d_value,), need("ssm_norm", d_value))
    result.add(f"{blk}.ssm_out.weight", (d_model, d_inner), Part(out, columns=by_row))


def _channels(
    checkpoint: Checkpoint,
    mixer: str,
    names: tuple[str, ...],
    keys: Mapping[str, int],
    columns: int,
    by_row: np.ndarray | None,
) -> list[Part]:
    """Rows for queries, keys and values, the last in the order `by_row`."""
    width, d_inner = keys["ssm.group_count"] * keys["ssm.state_size"], keys["ssm.inner_size"]

    def need(name: str, rows: int):
        return checkpoint.require(f"{mixer}.{name}.weight", rows, columns)

    if len(names) > 1:
        q, k, v = names
        return [Part(need(q, width)), Part(need(k, width)), Part(need(v, d_inner), rows=by_row)]
    source = need(names[0], 2 * width + d_inner)
    if by_row is None:
        return [Part(source)]
    return [Part(source, rows=np.concatenate([np.arange(2 * width), 2 * width + by_row]))]


def tiled(key_heads: int, heads: int, width: int) -> np.ndarray | None:
    """Rows of value heads from grouped (head k r + j) to tiled order (head j Hk + k).

    None where both are the same.
    """
    if key_heads == heads:
        return None
    rows = np.arange(heads * width).reshape(key_heads, heads // key_heads, width)
    return rows.swapaxes(0, 1).reshape(-1)
