"""flash-linear-attention's `gated_deltanet` to GGUF `gated-deltanet`.

llama.cpp has no such architecture; keys and tensor names are those of its nearest kin, `qwen35`,
and value heads are tiled as there: value head j reads key head j mod key heads.
"""

from __future__ import annotations

import math

import numpy as np

from ..kernels.errors import InvalidFile, UnsupportedModel
from .checkpoint import Checkpoint
from .plan import Plan, Transform, negative_exp

MODEL_TYPES = ("gated_deltanet",)


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor."""
    config = checkpoint.config
    if config.get("attn"):
        raise UnsupportedModel(
            f"{config.path}: attn names attention layers, which keelback cannot run yet"
        )
    if not config.flag("use_short_conv", True):
        raise UnsupportedModel(
            f"{config.path}: use_short_conv is off, which the architecture does not allow"
        )
    for key in ("hidden_act", "output_gate_activation"):
        config.one_of(key, "swish", "swish", "silu")
    d_model, layers = config.count("hidden_size"), config.count("num_hidden_layers")
    key_heads, d_key = config.count("num_heads", 6), config.count("head_dim", 256)
    heads = config.count("num_v_heads", key_heads)
    d_value = int(d_key * config.number("expand_v", 2))
    if heads % key_heads or d_value != d_key * config.number("expand_v", 2):
        raise InvalidFile(
            f"{config.path}: num_v_heads {heads} or expand_v do not go with num_heads {key_heads}"
        )
    gate = config.flag("use_gate", True)
    embedding = checkpoint.require("model.embeddings.weight")
    d_ff = checkpoint.require("model.layers.0.mlp.up_proj.weight").shape[0]

    keys = {
        "context_length": config.count("max_position_embeddings", 2048),
        "embedding_length": d_model, "block_count": layers, "vocab_size": embedding.shape[0],
        "feed_forward_length": d_ff, "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": config.number("norm_eps", 1e-6),
        "ssm.conv_kernel": config.count("conv_size", 4), "ssm.inner_size": heads * d_value,
        "ssm.state_size": d_key, "ssm.group_count": key_heads, "ssm.time_step_rank": heads,
        "ssm.allow_neg_eigval": config.flag("allow_neg_eigval", False), "ssm.use_gate": gate,
    }  # fmt: skip
    remark = "keelback only: llama.cpp has no architecture for Gated DeltaNet without attention"
    result = Plan("gated-deltanet", keys, remarks=[remark])
    result.add("token_embd.weight", (embedding.shape[0], d_model), embedding)
    result.add("output_norm.weight", (d_model,), checkpoint.require("model.norm.weight"))
    if "lm_head.weight" in checkpoint.tensors:
        result.add(
            "output.weight", (embedding.shape[0], d_model), checkpoint.tensors["lm_head.weight"]
        )
    for i in range(layers):
        _add_mixer(result, checkpoint, i)
        layer, blk = f"model.layers.{i}", f"blk.{i}"
        for hf, gguf in (("attn_norm", "attn_norm"), ("mlp_norm", "ffn_norm")):
            result.add(
                f"{blk}.{gguf}.weight", (d_model,), checkpoint.require(f"{layer}.{hf}.weight")
            )
        for part, shape in (
            ("gate", (d_ff, d_model)),
            ("up", (d_ff, d_model)),
            ("down", (d_model, d_ff)),
        ):
            result.add(
                f"{blk}.ffn_{part}.weight",
                shape,
                checkpoint.require(f"{layer}.mlp.{part}_proj.weight"),
            )
    return result


def _add_mixer(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys = result.keys
    d_model, taps = keys["embedding_length"], keys["ssm.conv_kernel"]
    heads, d_inner = keys["ssm.time_step_rank"], keys["ssm.inner_size"]
    key_width = keys["ssm.group_count"] * keys["ssm.state_size"]
    width, d_value = 2 * key_width + d_inner, d_inner // heads
    tiled = _tiler(keys["ssm.group_count"], heads)
    layer, blk = f"model.layers.{i}.attn", f"blk.{i}"

    def source(name: str):
        return checkpoint.require(f"{layer}.{name}")

    def joined(*parts: np.ndarray) -> np.ndarray:
        q, k, v = (part.reshape(-1, part.shape[-1]) for part in parts)
        return np.concatenate([q, k, tiled(v)])

    projections = [source(f"{part}_proj.weight") for part in "qkv"]
    result.add(f"{blk}.attn_qkv.weight", (width, d_model), *projections, transform=joined)
    convs = [source(f"{part}_conv1d.weight") for part in "qkv"]
    result.add(f"{blk}.ssm_conv1d.weight", (width, taps), *convs, transform=joined)
    if f"{layer}.q_conv1d.bias" in checkpoint.tensors:
        biases = [source(f"{part}_conv1d.bias") for part in "qkv"]
        result.add(
            f"{blk}.ssm_conv1d.bias", (width,), *biases,
            transform=lambda *parts: joined(*(part[:, None] for part in parts))[:, 0],
        )  # fmt: skip
    if keys["ssm.use_gate"]:
        result.add(
            f"{blk}.attn_gate.weight", (d_inner, d_model), source("g_proj.weight"), transform=tiled
        )
    for name, gguf in (("a_proj", "ssm_alpha"), ("b_proj", "ssm_beta")):
        result.add(
            f"{blk}.{gguf}.weight", (heads, d_model), source(f"{name}.weight"), transform=tiled
        )
    result.add(
        f"{blk}.ssm_a",
        (heads,),
        source("A_log"),
        transform=lambda a_log: tiled(negative_exp(a_log)),
    )
    result.add(f"{blk}.ssm_dt.bias", (heads,), source("dt_bias"), transform=tiled)
    result.add(f"{blk}.ssm_norm.weight", (d_value,), source("o_norm.weight"))
    result.add(
        f"{blk}.ssm_out.weight",
        (d_model, d_inner),
        source("o_proj.weight"),
        transform=lambda w: tiled(w.T).T,
    )


def _tiler(key_heads: int, heads: int) -> Transform:
    """Rows of value heads from grouped (head k r + j) to tiled order (head j Hk + k)."""
    ratio = heads // key_heads

    def tiled(rows: np.ndarray) -> np.ndarray:
        per_head = math.prod(rows.shape) // heads // math.prod(rows.shape[1:])
        grouped = rows.reshape(key_heads, ratio, per_head, *rows.shape[1:])
        return grouped.swapaxes(0, 1).reshape(rows.shape)

    return tiled
