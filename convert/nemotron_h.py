"""Hugging Face `nemotron_h` (Nemotron-H, Nemotron-3) to GGUF `nemotron_h` and `nemotron_h_moe`."""

from __future__ import annotations

from typing import Any

from ..kernels.errors import InvalidFile, UnsupportedModel
from .checkpoint import Checkpoint
from .config import Config
from .experts import add_experts, expert_groups
from .layers import (
    CONTEXT_LENGTH,
    KINDS,
    add_attention,
    add_ends,
    add_linear,
    add_mlp,
    add_norm,
    head_counts,
    layer_types,
)
from .mamba2 import add_mixer, remark_limit
from .plan import Plan
from .rope import rope_of

MODEL_TYPES = ("nemotron_h",)
#: Names of older configs, which transformers still takes.
SPELLINGS = {
    "n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv",
    "time_step_limit": "mamba_dt_limit", "n_routed_experts": "num_local_experts",
}  # fmt: skip

#: A layer has one of these alone. The marks are those of `hybrid_override_pattern`.
_KINDS = KINDS | {"mlp": ("mlp",), "moe": ("moe",)}
_MARKS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}

#: MLPs have no gate.
_NAMES = {"up": "up_proj", "down": "down_proj"}


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of `nemotron_h`."""
    config = checkpoint.config
    config.one_of("mlp_hidden_act", "relu2", "relu2")
    config.one_of("mamba_hidden_act", "silu", "silu", "swish")
    if config.get("block_configs") is not None:
        raise UnsupportedModel(
            f"{config.path}: block_configs gives every layer sizes of its own (Puzzle), which "
            "keelback cannot convert"
        )
    kinds = _layers(config)
    experts = "moe" in kinds
    d_ff = {"mlp": "intermediate_size", "moe": "moe_intermediate_size"}
    keys = {
        "context_length": CONTEXT_LENGTH,
        "embedding_length": config.count("hidden_size"),
        "block_count": len(kinds),
        "feed_forward_length": [config.count(d_ff[k]) if k in d_ff else 0 for k in kinds],
        **_attention_keys(config, kinds),
        **_mixer_keys(config),
        **(_expert_keys(config) if experts else {}),
    }
    result = Plan("nemotron_h_moe" if experts else "nemotron_h", keys)
    if experts and "mlp" in kinds:
        result.remark(
            "for keelback only: some layers have an MLP and others experts, and llama.cpp knows "
            "only models with one of them"
        )
    remark_limit(result, config)
    add_ends(result, checkpoint, "model.embeddings.weight", "model.norm_f.weight")
    add = {"full_attention": _add_attention, "mlp": _add_mlp, "moe": _add_experts}
    for i, kind in enumerate(kinds):
        norm, d_model = f"model.layers.{i}.norm", keys["embedding_length"]
        add_norm(result, checkpoint, norm, f"blk.{i}.attn_norm", d_model)
        if kind == "linear_attention":
            add_mixer(result, checkpoint, f"model.layers.{i}.mixer", f"blk.{i}")
        else:
            add[kind](result, checkpoint, i)
    return result


def _layers(config: Config) -> list[str]:
    """The kinds of all layers, from a list or, in older releases, from a text of marks."""
    pattern = config.get("hybrid_override_pattern")
    if config.get("layer_types") is None and isinstance(pattern, str):
        kinds = [_MARKS.get(mark, mark) for mark in pattern]
        values = config.values | {"hybrid_override_pattern": kinds}
        config = Config(config.path, values, {"layer_types": "hybrid_override_pattern"})
    types = layer_types(config, _KINDS)
    if types is None:
        raise InvalidFile(
            f"{config.path} lacks the key layers_block_type; download the checkpoint again"
        )
    return types


def _attention_keys(config: Config, kinds: list[str]) -> dict[str, Any]:
    heads, key_heads = head_counts(config)
    d_head = config.count("head_dim", config.count("attention_head_dim", 128))
    eps = config.number("layer_norm_epsilon", 1e-5)
    keys: dict[str, Any] = {
        "attention.head_count": heads,
        "attention.head_count_kv": [key_heads if k == "full_attention" else 0 for k in kinds],
        "attention.key_length": d_head, "attention.value_length": d_head,
        "attention.layer_norm_epsilon": eps, "attention.layer_norm_rms_epsilon": eps,
        # Nothing is turned by positions, but llama.cpp's converter says how it would be.
        "rope.scaling.finetuned": False,
        "rope.dimension_count": config.count("hidden_size") // heads,
    }  # fmt: skip
    rope = rope_of(config)
    if rope.get("rope_theta") is not None:
        keys["rope.freq_base"] = rope.number("rope_theta")
    return keys


def _mixer_keys(config: Config) -> dict[str, Any]:
    heads, groups = config.multiple("mamba_num_heads", "n_groups", 128, 8)
    return {
        "ssm.conv_kernel": config.count("conv_kernel", 4),
        "ssm.inner_size": heads * config.count("mamba_head_dim", 64),
        "ssm.state_size": config.count("ssm_state_size", 128), "ssm.time_step_rank": heads,
        "ssm.group_count": groups,
    }  # fmt: skip


def _expert_keys(config: Config) -> dict[str, Any]:
    experts, used = config.count("n_routed_experts", 8), config.count("num_experts_per_tok", 2)
    groups, groups_used = expert_groups(config, experts, used)
    keys = {
        "expert_count": experts, "expert_used_count": used,
        "expert_group_count": groups, "expert_group_used_count": groups_used,
        "expert_feed_forward_length": config.count("moe_intermediate_size"),
        "expert_shared_count": config.count("n_shared_experts", 1),
        "expert_shared_feed_forward_length": config.count("moe_shared_expert_intermediate_size"),
        "expert_weights_norm": config.flag("norm_topk_prob", True),
        "expert_weights_scale": config.number("routed_scaling_factor", 1.0),
    }  # fmt: skip
    if config.get("moe_latent_size") is not None:
        keys["moe_latent_size"] = config.count("moe_latent_size")
    return keys


def _add_attention(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    """llama.cpp lays pairs side by side here too, though nothing turns them."""
    keys, hf = result.keys, f"model.layers.{i}.mixer"
    d_model, d_head = keys["embedding_length"], keys["attention.key_length"]
    counts = keys["attention.head_count"], keys["attention.head_count_kv"][i]
    add_attention(result, checkpoint, hf, f"blk.{i}", d_model, counts, d_head, paired=d_head)


def _add_mlp(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    d_model, d_ff = result.keys["embedding_length"], result.keys["feed_forward_length"][i]
    mlp = f"model.layers.{i}.mixer"
    add_mlp(result, checkpoint, mlp, f"blk.{i}", d_ff, d_model, _NAMES)


def _add_experts(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys, mixer, blk = result.keys, f"model.layers.{i}.mixer", f"blk.{i}"
    d_model, experts = keys["embedding_length"], keys["expert_count"]
    latent = keys.get("moe_latent_size")
    add_linear(result, checkpoint, f"{mixer}.gate", f"{blk}.ffn_gate_inp", experts, d_model)
    bias = checkpoint.require(f"{mixer}.gate.e_score_correction_bias", experts)
    result.add(f"{blk}.exp_probs_b.bias", (experts,), bias)
    if latent is not None:
        down, up = (f"{mixer}.fc{n}_latent_proj" for n in (1, 2))
        add_linear(result, checkpoint, down, f"{blk}.ffn_latent_down", latent, d_model)
        add_linear(result, checkpoint, up, f"{blk}.ffn_latent_up", d_model, latent)
    width = keys["expert_feed_forward_length"]
    inside = latent or d_model
    add_experts(result, checkpoint, blk, f"{mixer}.experts", experts, width, inside, _NAMES)
    shared, width = f"{mixer}.shared_experts", keys["expert_shared_feed_forward_length"]
    add_mlp(result, checkpoint, shared, blk, width, d_model, _NAMES, "_shexp")
    if checkpoint.find(f"{shared}.up_proj.bias") is not None:
        result.remark("for keelback only: shared experts have biases (ffn_up_shexp.bias)")
