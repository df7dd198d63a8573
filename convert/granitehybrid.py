"""Hugging Face `granitemoehybrid` (Granite-4-H) and `bamba` to GGUF `granitehybrid`."""

from __future__ import annotations

from typing import Any

from ..kernels.errors import InvalidFile, UnsupportedModel
from .checkpoint import Checkpoint
from .config import Config
from .experts import NAMES, experts_used, half
from .layers import (
    CONTEXT_LENGTH,
    add_attention,
    add_ends,
    add_mlp,
    add_norm,
    head_counts,
    head_width,
    layer_types,
    periodic,
    refuse_attention_only,
    remark_inner_size,
)
from .mamba2 import add_mixer, remark_limit
from .plan import Plan
from .rope import rope_of, speed_keys

MODEL_TYPES = ("granitemoehybrid", "bamba")
CLASSES = {"GraniteMoeHybridForCausalLM": "granitemoehybrid", "BambaForCausalLM": "bamba"}

#: Granite's multipliers: config's name, GGUF's. All are 1 where config says nothing.
_SCALES = {
    "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
}  # fmt: skip


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of `granitehybrid`."""
    config = checkpoint.config
    config.one_of("hidden_act", "silu", "silu", "swish")
    bamba = config.get("model_type") == "bamba"
    d_model = config.count("hidden_size")
    keys = {
        "embedding_length": d_model,
        "block_count": config.count("num_hidden_layers"),
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-5 if bamba else 1e-6),
        **_attention_keys(config, d_model),
        **_position_keys(config, bamba),
        **_mixer_keys(config, d_model),
        **(_mlp_keys(config) if bamba else _granite_keys(config)),
    }
    result = Plan("granitehybrid", keys)
    remark_inner_size(result)
    remark_limit(result, config)
    last = "model.final_layernorm.weight" if bamba else "model.norm.weight"
    add_ends(result, checkpoint, "model.embed_tokens.weight", last)
    for i in range(keys["block_count"]):
        _add_norms(result, checkpoint, i, "pre_ff" if bamba else "post_attention")
        if keys["attention.head_count_kv"][i]:
            _add_attention(result, checkpoint, i)
        else:
            add_mixer(result, checkpoint, f"model.layers.{i}.mamba", f"blk.{i}")
        if bamba:
            mlp, d_ff = f"model.layers.{i}.feed_forward", keys["feed_forward_length"]
            add_mlp(result, checkpoint, mlp, f"blk.{i}", d_ff, d_model, NAMES)
        else:
            _add_experts(result, checkpoint, i)
    return result


def _attention_keys(config: Config, d_model: int) -> dict[str, Any]:
    heads, key_heads = head_counts(config)
    head_width(config, d_model, heads)
    layers = _layer_types(config)
    refuse_attention_only(config, layers)
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": [key_heads if attention else 0 for attention in layers],
    }


def _layer_types(config: Config) -> list[bool]:
    """For each layer, whether it is one of attention."""
    count = config.count("num_hidden_layers")
    types = layer_types(config)
    if types is not None:
        return [kind == "full_attention" for kind in types]
    chosen = config.places("attn_layer_indices")
    if not chosen and config.get("attn_layer_period") is not None:
        chosen = set(periodic(config, "attn", 1, 0))
    return [i in chosen for i in range(count)]


def _position_keys(config: Config, bamba: bool) -> dict[str, Any]:
    """Rotary positions, or none: then nothing ends at a length, and llama.cpp says 2^20."""
    head = config.count("hidden_size") // config.count("num_attention_heads", 32)
    kind = config.get("position_embedding_type", "rope" if bamba else "nope")
    if kind not in ("rope", "nope"):
        raise UnsupportedModel(
            f"{config.path}: position_embedding_type is {str(kind)[:40]!r}; keelback runs rope "
            "and nope"
        )
    rotary, rope = bamba or kind == "rope", rope_of(config)
    keys: dict[str, Any] = {
        "rope.scaling.finetuned": rotary, "rope.dimension_count": head,
        "context_length": CONTEXT_LENGTH,
    }  # fmt: skip
    if rotary:
        keys["context_length"] = config.count("max_position_embeddings", 262144 if bamba else 2048)
        keys |= speed_keys(config, 10000.0)
    elif rope.get("rope_theta") is not None:
        keys["rope.freq_base"] = rope.number("rope_theta")
    if bamba:
        keys |= _partial_rotation(config, head)
    return keys


def _partial_rotation(config: Config, head: int) -> dict[str, int]:
    """Bamba turns a part of every head, half of it unless it says otherwise.

    llama.cpp turns the right values if only those are rearranged for it; its own converter
    rearranges whole heads, so a key of ours tells the two kinds of file apart.
    """
    count = int(head * rope_of(config).number("partial_rotary_factor", 0.5))
    if config.count("attn_rotary_emb", count) != count or count % 2 or not 0 < count <= head:
        raise UnsupportedModel(
            f"{config.path}: attn_rotary_emb is {config.get('attn_rotary_emb')}, where "
            f"partial_rotary_factor turns {count} values of {head}; keelback runs an even number, "
            "of which both agree"
        )
    keys = {"rope.dimension_count": count}
    return keys if count == head else {**keys, "rope.rearranged_count": count}


def _mixer_keys(config: Config, d_model: int) -> dict[str, Any]:
    heads, groups = config.count("mamba_n_heads", 128), config.count("mamba_n_groups", 1)
    d_inner = config.count("mamba_expand", 2) * d_model
    automatic = config.get("mamba_d_head", "auto") == "auto"
    if heads % groups or d_inner % heads:
        raise InvalidFile(
            f"{config.path}: mamba_n_heads is {heads}, which does not go with mamba_n_groups "
            f"{groups} and an inner size of {d_inner}"
        )
    if not automatic and config.count("mamba_d_head") * heads != d_inner:
        raise InvalidFile(
            f"{config.path}: mamba_d_head is {config.get('mamba_d_head')}, and {heads} heads have "
            f"to make {d_inner}"
        )
    return {
        "ssm.conv_kernel": config.count("mamba_d_conv", 4),
        "ssm.inner_size": d_inner,
        "ssm.state_size": config.count("mamba_d_state", 256),
        "ssm.time_step_rank": heads,
        "ssm.group_count": groups,
    }


def _mlp_keys(config: Config) -> dict[str, Any]:
    return {"feed_forward_length": config.count("intermediate_size", 14336)}


def _granite_keys(config: Config) -> dict[str, Any]:
    """Multipliers and experts; a model without experts has only what others share."""
    shared = config.count("shared_intermediate_size", 1024)
    experts = config.count("num_local_experts", 8, least=0)
    used = experts_used(config, experts, 2) if experts else 0
    return {
        **{ours: config.number(theirs, 1.0) for theirs, ours in _SCALES.items()},
        "feed_forward_length": config.count("intermediate_size", 11008) if experts else shared,
        "expert_shared_feed_forward_length": shared,
        "expert_count": experts,
        "expert_used_count": used,
    }


def _add_norms(result: Plan, checkpoint: Checkpoint, i: int, second: str) -> None:
    d_model = result.keys["embedding_length"]
    for hf, gguf in (("input", "attn"), (second, "ffn")):
        name = f"model.layers.{i}.{hf}_layernorm"
        add_norm(result, checkpoint, name, f"blk.{i}.{gguf}_norm", d_model)


def _add_attention(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys = result.keys
    d_model, heads = keys["embedding_length"], keys["attention.head_count"]
    counts, d_head = (heads, keys["attention.head_count_kv"][i]), d_model // heads
    paired = keys.get("rope.rearranged_count", d_head)
    hf = f"model.layers.{i}.self_attn"
    add_attention(result, checkpoint, hf, f"blk.{i}", d_model, counts, d_head, paired)


def _add_experts(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys, need, layer = result.keys, checkpoint.require, f"model.layers.{i}"
    d_model, d_ff = keys["embedding_length"], keys["feed_forward_length"]
    experts, shared = keys["expert_count"], keys["expert_shared_feed_forward_length"]
    kind = "_shexp" if experts else ""
    both = need(f"{layer}.shared_mlp.input_linear.weight", 2 * shared, d_model)
    for index, part in enumerate(("gate", "up")):
        rows = half(both, shared, index)
        result.add(f"blk.{i}.ffn_{part}{kind}.weight", (shared, d_model), rows)
    source = need(f"{layer}.shared_mlp.output_linear.weight", d_model, shared)
    result.add(f"blk.{i}.ffn_down{kind}.weight", (d_model, shared), source)
    if not experts:
        return
    moe = f"{layer}.block_sparse_moe"
    router = need(f"{moe}.router.layer.weight", experts, d_model)
    result.add(f"blk.{i}.ffn_gate_inp.weight", (experts, d_model), router)
    both = need(f"{moe}.input_linear.weight", experts, 2 * d_ff, d_model)
    for index, part in enumerate(("gate", "up")):
        rows = half(both, d_ff, index)
        result.add(f"blk.{i}.ffn_{part}_exps.weight", (experts, d_ff, d_model), rows)
    source = need(f"{moe}.output_linear.weight", experts, d_model, d_ff)
    # Seen as one matrix, so that it is not read an expert at a time.
    source = source.reshaped(experts * d_model, d_ff)
    result.add(f"blk.{i}.ffn_down_exps.weight", (experts, d_model, d_ff), source)
