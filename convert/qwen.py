"""Hugging Face `qwen3_next` and `qwen3_5` (Qwen3.5 to 3.8), with experts and without, to GGUF."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile, UnsupportedModel
from .checkpoint import Checkpoint
from .config import Config
from .delta import add_mixer
from .experts import NAMES, add_experts, experts_used
from .layers import (
    add_ends,
    add_linear,
    add_mlp,
    add_norm,
    head_counts,
    layer_types,
    plus_one,
    refuse_attention_only,
)
from .plan import Part, Plan
from .rope import rope_keys, rope_of

#: transformers' names (the later ones are those of the language models alone), GGUF's.
_ARCHITECTURES = {
    "qwen3_next": "qwen3next", "qwen3_5": "qwen35", "qwen3_5_moe": "qwen35moe",
    "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe",
}  # fmt: skip
MODEL_TYPES = tuple(_ARCHITECTURES)

#: Qwen3.5's sections of M-RoPE, which llama.cpp wants to know for text as well.
_SECTIONS = [11, 11, 10]
#: The epsilon under the root of the L2 norm of queries and keys, whatever rms_norm_eps says.
_L2_EPS = 1e-6
#: What a mixer's parts are called, by their names in a GGUF file.
_MIXER = {
    "attn_qkv": ("in_proj_qkv",), "attn_gate": ("in_proj_z",), "ssm_conv1d": ("conv1d",),
    "ssm_alpha": ("in_proj_a",), "ssm_beta": ("in_proj_b",), "ssm_norm": ("norm",),
    "ssm_out": ("out_proj",),
}  # fmt: skip
#: Those of them that Qwen3-Next has as well; its projections lie together by key head.
_MIXER_NEXT = {name: _MIXER[name] for name in ("ssm_conv1d", "ssm_norm", "ssm_out")}


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of the three."""
    config = checkpoint.config
    name = _ARCHITECTURES[config.get("model_type")]
    config.one_of("hidden_act", "silu", "silu", "swish")
    if not config.flag("attn_output_gate", True):
        raise UnsupportedModel(f"{config.path}: attn_output_gate is false; keelback runs it true")
    keys = {
        "context_length": config.count("max_position_embeddings", 32768),
        "embedding_length": config.count("hidden_size"),
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-6),
        **_layer_keys(config),
        **_attention_keys(config, name),
        **_mixer_keys(config),
        **_mlp_keys(config, name),
    }
    result = Plan(name, keys)
    _remark(result, config)
    add_ends(result, checkpoint, "model.embed_tokens.weight", "model.norm.weight", plus_one)
    for i, recurrent in enumerate(keys["attention.recurrent_layers"]):
        _add_norms(result, checkpoint, i)
        if recurrent:
            _add_mixer(result, checkpoint, i)
        else:
            _add_attention(result, checkpoint, i)
        _add_feed_forward(result, checkpoint, i)
    return result


def _layer_keys(config: Config) -> dict[str, Any]:
    """Which layers are of attention: every so many, unless config names each."""
    layers, interval = config.count("num_hidden_layers"), config.count("full_attention_interval", 4)
    types = layer_types(config)
    if types is None:
        recurrent = [(i + 1) % interval != 0 for i in range(layers)]
    else:
        recurrent = [kind == "linear_attention" for kind in types]
    refuse_attention_only(config, (not each for each in recurrent))
    return {
        "block_count": layers, "full_attention_interval": interval,
        "attention.recurrent_layers": recurrent,
    }  # fmt: skip


def _attention_keys(config: Config, name: str) -> dict[str, Any]:
    heads, key_heads = head_counts(config, 16, 4 if name == "qwen35" else 2)
    d_head = config.count("head_dim", 256)
    keys = {
        "attention.head_count": heads, "attention.head_count_kv": key_heads,
        "attention.key_length": d_head, "attention.value_length": d_head,
        **rope_keys(config, d_head, theta=10000.0, part=0.25),
    }  # fmt: skip
    sections = rope_of(config).get("mrope_section", None if name == "qwen3next" else _SECTIONS)
    if sections is None:
        return keys
    fits = isinstance(sections, list) and all(type(n) is int and 0 <= n < 1 << 24 for n in sections)
    if not fits or len(sections) not in (3, 4):
        raise InvalidFile(f"{config.path}: mrope_section is not three whole numbers")
    return {**keys, "rope.dimension_sections": [*sections, 0][:4]}


def _mixer_keys(config: Config) -> dict[str, Any]:
    heads, key_heads = config.multiple("linear_num_value_heads", "linear_num_key_heads", 32, 16)
    return {
        "ssm.conv_kernel": config.count("linear_conv_kernel_dim", 4),
        "ssm.state_size": config.count("linear_key_head_dim", 128),
        "ssm.group_count": key_heads,
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * config.count("linear_value_head_dim", 128),
    }


def _mlp_keys(config: Config, name: str) -> dict[str, Any]:
    if name == "qwen35":
        return {"feed_forward_length": config.count("intermediate_size", 12288)}
    next_ = name == "qwen3next"
    if config.count("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise UnsupportedModel(
            f"{config.path}: decoder_sparse_step or mlp_only_layers names layers without experts; "
            "keelback runs models that have them in all layers or in none"
        )
    if not config.flag("norm_topk_prob", True):
        raise UnsupportedModel(f"{config.path}: norm_topk_prob is false; keelback runs it true")
    experts = config.count("num_experts", 512 if next_ else 256)
    keys = {
        "expert_count": experts,
        "expert_used_count": experts_used(config, experts, 10 if next_ else 8),
        "expert_feed_forward_length": config.count("moe_intermediate_size", 512),
        "expert_shared_feed_forward_length": config.count("shared_expert_intermediate_size", 512),
    }
    if next_:
        # Of layers without experts: there are none, but llama.cpp's converter says it too.
        keys["feed_forward_length"] = config.count("intermediate_size", 5632)
    return keys


def _remark(result: Plan, config: Config) -> None:
    """What llama.cpp has no way to run."""
    keys = result.keys
    d_key, d_value = keys["ssm.state_size"], keys["ssm.inner_size"] // keys["ssm.time_step_rank"]
    if d_key != d_value:
        result.remark(
            f"for keelback only: linear attention has keys of {d_key} numbers and values of "
            f"{d_value}"
        )
    if keys["attention.layer_norm_rms_epsilon"] != _L2_EPS:
        result.remark(
            f"for keelback only: queries and keys of linear attention are normed with {_L2_EPS}, "
            "where llama.cpp takes rms_norm_eps"
        )
    if config.flag("attention_bias", False):
        result.remark("for keelback only: the projections of attention have biases")


def _add_norms(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    d_model = result.keys["embedding_length"]
    for hf, gguf in (("input", "attn"), ("post_attention", "post_attention")):
        name = f"model.layers.{i}.{hf}_layernorm"
        add_norm(result, checkpoint, name, f"blk.{i}.{gguf}_norm", d_model, plus_one)


def _add_attention(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys = result.keys
    d_model, d_head = keys["embedding_length"], keys["attention.key_length"]
    heads, key_heads = keys["attention.head_count"], keys["attention.head_count_kv"]
    for name, gguf, shape in (
        # Of every head the query and the gate.
        ("q", "q", (2 * heads * d_head, d_model)), ("k", "k", (key_heads * d_head, d_model)),
        ("v", "v", (key_heads * d_head, d_model)), ("o", "output", (d_model, heads * d_head)),
    ):  # fmt: skip
        hf = f"model.layers.{i}.self_attn.{name}_proj"
        add_linear(result, checkpoint, hf, f"blk.{i}.attn_{gguf}", *shape)
    for name in ("q", "k"):
        hf, gguf = f"model.layers.{i}.self_attn.{name}_norm", f"blk.{i}.attn_{name}_norm"
        add_norm(result, checkpoint, hf, gguf, d_head, plus_one)


def _add_mixer(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    mixer, blk = f"model.layers.{i}.linear_attn", f"blk.{i}"
    if result.architecture != "qwen3next":
        add_mixer(result, checkpoint, mixer, blk, _MIXER)
        return
    add_mixer(result, checkpoint, mixer, blk, _MIXER_NEXT, tile=False)
    keys = result.keys
    d_model, d_inner, heads = (
        keys[key] for key in ("embedding_length", "ssm.inner_size", "ssm.time_step_rank")
    )
    key_heads, d_key = keys["ssm.group_count"], keys["ssm.state_size"]
    # For each key head its query, its key, and the values and gates of its value heads.
    widths = [d_key, d_key, d_inner // key_heads, d_inner // key_heads]
    count = key_heads * sum(widths)
    mixed = checkpoint.require(f"{mixer}.in_proj_qkvz.weight", count, d_model)
    rows = np.arange(count).reshape(key_heads, -1)
    *qkv, gate = (part.reshape(-1) for part in np.split(rows, np.cumsum(widths)[:-1], axis=1))
    for gguf, order in (("attn_qkv", np.concatenate(qkv)), ("attn_gate", gate)):
        result.add(f"{blk}.{gguf}.weight", (len(order), d_model), Part(mixed, rows=order))
    steps = checkpoint.require(f"{mixer}.in_proj_ba.weight", 2 * heads, d_model)
    result.add(f"{blk}.ssm_ba.weight", (2 * heads, d_model), steps)


def _add_feed_forward(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys, mlp, blk = result.keys, f"model.layers.{i}.mlp", f"blk.{i}"
    d_model = keys["embedding_length"]
    experts = keys.get("expert_count")
    if experts is None:
        add_mlp(result, checkpoint, mlp, blk, keys["feed_forward_length"], d_model, NAMES)
        return
    router = checkpoint.require(f"{mlp}.gate.weight", experts, d_model)
    result.add(f"{blk}.ffn_gate_inp.weight", (experts, d_model), router)
    width = keys["expert_feed_forward_length"]
    add_experts(result, checkpoint, blk, f"{mlp}.experts", experts, width, d_model)
    gate = checkpoint.require(f"{mlp}.shared_expert_gate.weight", 1, d_model)
    result.add(f"{blk}.ffn_gate_inp_shexp.weight", (1, d_model), gate)
    shared, width = f"{mlp}.shared_expert", keys["expert_shared_feed_forward_length"]
    add_mlp(result, checkpoint, shared, blk, width, d_model, NAMES, "_shexp")
