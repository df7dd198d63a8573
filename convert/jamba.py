"""Hugging Face `jamba` to GGUF `jamba`."""

from __future__ import annotations

import math
from typing import Any

from .checkpoint import Checkpoint
from .config import Config
from .experts import NAMES, add_experts, experts_used
from .layers import (
    add_attention,
    add_ends,
    add_linear,
    add_mlp,
    add_norm,
    head_counts,
    head_width,
    periodic,
    remark_inner_size,
)
from .mamba import add_mixer
from .plan import Plan

MODEL_TYPES = ("jamba",)
SPELLINGS = {"num_experts": "num_local_experts"}


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of `jamba`."""
    config = checkpoint.config
    config.one_of("hidden_act", "silu", "silu", "swish")
    d_model, layers = config.count("hidden_size"), config.count("num_hidden_layers")
    keys = {
        "context_length": config.count("max_position_embeddings", 262144),
        "embedding_length": d_model,
        "block_count": layers,
        "feed_forward_length": config.count("intermediate_size"),
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-6),
        **_attention_keys(config, d_model),
        **_mixer_keys(config, d_model),
        **_expert_keys(config),
    }
    result = Plan("jamba", keys)
    remark_inner_size(result)
    add_ends(result, checkpoint, "model.embed_tokens.weight", "model.final_layernorm.weight")
    # One expert needs no router.
    chosen = periodic(config, "expert", 2, 1) if keys["expert_count"] > 1 else []
    for i in range(layers):
        _add_norms(result, checkpoint, i)
        attention = keys["attention.head_count_kv"][i]
        (_add_attention if attention else _add_recurrence)(result, checkpoint, i)
        (_add_experts if i in chosen else _add_mlp)(result, checkpoint, i)
    return result


def _attention_keys(config: Config, d_model: int) -> dict[str, Any]:
    heads, key_heads = head_counts(config)
    head_width(config, d_model, heads)
    counts = [0] * config.count("num_hidden_layers")
    for i in periodic(config, "attn", 8, 4):
        counts[i] = key_heads
    return {"attention.head_count": heads, "attention.head_count_kv": counts}


def _mixer_keys(config: Config, d_model: int) -> dict[str, Any]:
    automatic = config.get("mamba_dt_rank", "auto") == "auto"
    rank = math.ceil(d_model / 16) if automatic else config.count("mamba_dt_rank")
    return {
        "ssm.conv_kernel": config.count("mamba_d_conv", 4),
        "ssm.inner_size": config.count("mamba_expand", 2) * d_model,
        "ssm.state_size": config.count("mamba_d_state", 16),
        "ssm.time_step_rank": rank,
    }


def _expert_keys(config: Config) -> dict[str, Any]:
    experts = config.count("num_experts", 16)
    # One alone is an MLP, of which config may say to use several.
    used = experts_used(config, experts, 2) if experts > 1 else 1
    return {"expert_count": experts, "expert_used_count": used}


def _add_norms(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    layer, blk, d_model = f"model.layers.{i}", f"blk.{i}", result.keys["embedding_length"]
    add_norm(result, checkpoint, f"{layer}.input_layernorm", f"{blk}.attn_norm", d_model)
    second = checkpoint.first(f"{layer}.pre_ff_layernorm", f"{layer}.pre_moe_layernorm")
    add_norm(result, checkpoint, second, f"{blk}.ffn_norm", d_model)


def _add_recurrence(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    mixer, blk = f"model.layers.{i}.mamba", f"blk.{i}"
    add_mixer(result, checkpoint, mixer, blk)
    d_state, rank = result.keys["ssm.state_size"], result.keys["ssm.time_step_rank"]
    for part, width in (("dt", rank), ("b", d_state), ("c", d_state)):
        names = (f"{mixer}.{spelling}_layernorm" for spelling in (part, part.upper()))
        add_norm(result, checkpoint, checkpoint.first(*names), f"{blk}.ssm_{part}_norm", width)


def _add_attention(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys, hf = result.keys, f"model.layers.{i}.self_attn"
    d_model, heads = keys["embedding_length"], keys["attention.head_count"]
    counts = heads, keys["attention.head_count_kv"][i]
    add_attention(result, checkpoint, hf, f"blk.{i}", d_model, counts, d_model // heads)


def _add_mlp(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    places = [f"model.layers.{i}.{name}" for name in ("feed_forward", "moe")]
    # Early releases call an MLP the first and only of a layer's experts.
    places += [f"{place}.experts.0" for place in places]
    mlp = checkpoint.first(*(f"{place}.down_proj" for place in places)).rpartition(".")[0]
    d_model, d_ff = result.keys["embedding_length"], result.keys["feed_forward_length"]
    add_mlp(result, checkpoint, mlp, f"blk.{i}", d_ff, d_model, NAMES)


def _add_experts(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    places = (f"model.layers.{i}.{name}" for name in ("feed_forward", "moe"))
    router = checkpoint.first(*(f"{place}.router" for place in places))
    keys, experts = result.keys, f"{router.rpartition('.')[0]}.experts"
    count, d_model, d_ff = (
        keys[key] for key in ("expert_count", "embedding_length", "feed_forward_length")
    )
    add_linear(result, checkpoint, router, f"blk.{i}.ffn_gate_inp", count, d_model)
    add_experts(result, checkpoint, f"blk.{i}", experts, count, d_ff, d_model)
