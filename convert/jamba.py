"""Hugging Face `jamba` to GGUF `jamba`."""

from __future__ import annotations

import math
from typing import Any

from ..kernels.errors import InvalidFile, UnsupportedModel
from .checkpoint import Checkpoint
from .config import Config
from .experts import NAMES, add_experts
from .layers import add_linear, add_mlp, add_norm
from .mamba import add_ends, add_mixer
from .plan import Plan

MODEL_TYPES = ("jamba",)


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of `jamba`."""
    config = checkpoint.config
    config.one_of("hidden_act", "silu", "silu", "swish")
    d_model = config.count("hidden_size")
    keys = {
        "context_length": config.count("max_position_embeddings", 262144),
        "embedding_length": d_model,
        "block_count": config.count("num_hidden_layers"),
        "feed_forward_length": config.count("intermediate_size"),
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-6),
        **_attention_keys(config, d_model),
        **_mixer_keys(config, d_model),
    }
    chosen = _layers(config, "expert", 2, 1)
    keys["expert_count"] = experts = config.count("num_experts", 16)
    keys["expert_used_count"] = used = config.count("num_experts_per_tok", 2)
    if experts == 1:
        # Then transformers has no router, and llama.cpp does not load a file that uses more.
        chosen, keys["expert_used_count"] = set(), 1
    elif used > experts:
        raise InvalidFile(
            f"{config.path}: num_experts_per_tok is {used}, and there are {experts} experts"
        )
    result = Plan("jamba", keys)
    if keys["ssm.inner_size"] != 2 * d_model:
        result.remark(
            f"for keelback only: the inner size {keys['ssm.inner_size']} is not twice the hidden "
            f"size {d_model}"
        )
    add_ends(result, checkpoint, "model.embed_tokens.weight", "model.final_layernorm.weight")
    for i in range(keys["block_count"]):
        _add_norms(result, checkpoint, i)
        attention = keys["attention.head_count_kv"][i]
        (_add_attention if attention else _add_recurrence)(result, checkpoint, i)
        (_add_experts if i in chosen else _add_mlp)(result, checkpoint, i)
    return result


def _layers(config: Config, kind: str, period: int, offset: int) -> set[int]:
    """Layers that are of a kind: one in every period. period, offset: of a silent config."""
    period = config.count(f"{kind}_layer_period", period)
    offset = config.get(f"{kind}_layer_offset", offset)
    if type(offset) is not int or not 0 <= offset < period:
        raise InvalidFile(
            f"{config.path}: {kind}_layer_offset is {repr(offset)[:40]}, not a whole number below "
            f"{kind}_layer_period, {period}"
        )
    return {i for i in range(config.count("num_hidden_layers")) if i % period == offset}


def _attention_keys(config: Config, d_model: int) -> dict[str, Any]:
    heads = config.count("num_attention_heads", 32)
    key_heads = config.count("num_key_value_heads", heads)
    if heads % key_heads or d_model % heads:
        raise InvalidFile(
            f"{config.path}: num_attention_heads is {heads}, which does not go with "
            f"num_key_value_heads {key_heads} and hidden_size {d_model}"
        )
    if config.count("head_dim", d_model // heads) != d_model // heads:
        raise UnsupportedModel(
            f"{config.path}: head_dim is {config.get('head_dim')}, and this architecture knows "
            f"only hidden_size / num_attention_heads, {d_model // heads}"
        )
    chosen = _layers(config, "attn", 8, 4)
    layers = range(config.count("num_hidden_layers"))
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": [key_heads if i in chosen else 0 for i in layers],
    }


def _mixer_keys(config: Config, d_model: int) -> dict[str, Any]:
    automatic = config.get("mamba_dt_rank", "auto") == "auto"
    rank = math.ceil(d_model / 16) if automatic else config.count("mamba_dt_rank")
    return {
        "ssm.conv_kernel": config.count("mamba_d_conv", 4),
        "ssm.inner_size": config.count("mamba_expand", 2) * d_model,
        "ssm.state_size": config.count("mamba_d_state", 16),
        "ssm.time_step_rank": rank,
    }


def _add_norms(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    layer, blk, d_model = f"model.layers.{i}", f"blk.{i}", result.keys["embedding_length"]
    add_norm(result, checkpoint, f"{layer}.input_layernorm", f"{blk}.attn_norm", d_model)
    second = _found(checkpoint, f"{layer}.pre_ff_layernorm", f"{layer}.pre_moe_layernorm")
    add_norm(result, checkpoint, second, f"{blk}.ffn_norm", d_model)


def _add_recurrence(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    mixer, blk = f"model.layers.{i}.mamba", f"blk.{i}"
    add_mixer(result, checkpoint, mixer, blk)
    d_state, rank = result.keys["ssm.state_size"], result.keys["ssm.time_step_rank"]
    for part, width in (("dt", rank), ("b", d_state), ("c", d_state)):
        names = (f"{mixer}.{spelling}_layernorm" for spelling in (part, part.upper()))
        add_norm(result, checkpoint, _found(checkpoint, *names), f"{blk}.ssm_{part}_norm", width)


def _add_attention(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys = result.keys
    d_model, heads = keys["embedding_length"], keys["attention.head_count"]
    width = d_model // heads * keys["attention.head_count_kv"][i]
    shapes = {"q": d_model, "k": width, "v": width, "o": d_model}
    for name, rows in shapes.items():
        target = f"blk.{i}.attn_{'output' if name == 'o' else name}"
        hf = f"model.layers.{i}.self_attn.{name}_proj"
        add_linear(result, checkpoint, hf, target, rows, d_model)


def _add_mlp(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    places = [f"model.layers.{i}.{name}" for name in ("feed_forward", "moe")]
    # Early releases call an MLP the first and only of a layer's experts.
    places += [f"{place}.experts.0" for place in places]
    mlp = _found(checkpoint, *(f"{place}.down_proj" for place in places)).rpartition(".")[0]
    d_model, d_ff = result.keys["embedding_length"], result.keys["feed_forward_length"]
    add_mlp(result, checkpoint, mlp, f"blk.{i}", d_ff, d_model, NAMES)


def _add_experts(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    places = (f"model.layers.{i}.{name}" for name in ("feed_forward", "moe"))
    router = _found(checkpoint, *(f"{place}.router" for place in places))
    keys, experts = result.keys, f"{router.rpartition('.')[0]}.experts"
    count, d_model, d_ff = (
        keys[key] for key in ("expert_count", "embedding_length", "feed_forward_length")
    )
    add_linear(result, checkpoint, router, f"blk.{i}.ffn_gate_inp", count, d_model)
    add_experts(result, checkpoint, f"blk.{i}", experts, count, d_ff, d_model)


def _found(checkpoint: Checkpoint, *names: str) -> str:
    """The first of the names that a matrix or a norm has; the first of all where none has one.

    Early releases of the model have other names than transformers.
    """
    there = (name for name in names if checkpoint.find(f"{name}.weight") is not None)
    return next(there, names[0])
