"""Layers of mamba_ssm's models, as `mamba` and `mamba2` share them.

Beside a Mamba mixer they may have attention (MHA), and an MLP behind either (GatedMLP). Keys are
those of mamba_ssm's config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..kernels.errors import InvalidFile, UnsupportedModel
from .checkpoint import Checkpoint
from .config import Config
from .experts import half
from .layers import add_linear, add_norm
from .plan import Plan

#: What flash-linear-attention calls keys of transformers.
FLA_KEYS = {
    "layer_norm_epsilon": "norm_eps", "time_step_rank": "dt_rank", "time_step_limit": "dt_limit",
}  # fmt: skip
#: The width of an MLP is rounded up to a multiple of this.
_MULTIPLE = 128


def layer_keys(config: Config) -> dict[str, Any]:
    """Keys for what stands in a layer beside its Mamba mixer, or in its place.

    Raises UnsupportedModel for attention that is not causal, InvalidFile for numbers that do not
    go together.
    """
    d_ff = -(-config.count("d_intermediate", 0, least=0) // _MULTIPLE) * _MULTIPLE
    keys: dict[str, Any] = {"feed_forward_length": d_ff, "attention.head_count": 0}
    layers = range(config.count("num_hidden_layers"))
    attention = {i for i in config.places("attn_layer_idx") if i in layers}
    return keys | (_attention_keys(config, attention) if attention else {})


def _attention_keys(config: Config, attention: set[int]) -> dict[str, Any]:
    if config.get("attn_cfg.causal", False) is not True:
        raise UnsupportedModel(
            f"{config.path}: attn_cfg.causal is not true, so that tokens see those behind them; "
            "take a causal language model"
        )
    d_model = config.count("hidden_size")
    heads, key_heads = config.multiple("attn_cfg.num_heads", "attn_cfg.num_heads_kv")
    d_head = config.count("attn_cfg.head_dim", max(1, d_model // heads))
    layers = range(config.count("num_hidden_layers"))
    keys: dict[str, Any] = {
        "attention.head_count": [heads if i in attention else 0 for i in layers],
        "attention.head_count_kv": [key_heads if i in attention else 0 for i in layers],
        "attention.key_length": d_head, "attention.value_length": d_head,
    }  # fmt: skip
    if config.get("attn_cfg.softmax_scale") is not None:
        keys["attention.scale"] = config.number("attn_cfg.softmax_scale")
    if taps := config.count("attn_cfg.d_conv", 0, least=0):
        keys["shortconv.l_cache"] = taps
    if turned := config.count("attn_cfg.rotary_emb_dim", 0, least=0):
        keys["rope.dimension_count"] = turned
        keys["rope.freq_base"] = config.number("attn_cfg.rotary_emb_base", 10000.0)
        if turned % 2 or turned > d_head:
            raise InvalidFile(
                f"{config.path}: attn_cfg.rotary_emb_dim is {turned}, which is no even part of "
                f"heads of {d_head}"
            )
    return keys


def add_layer(
    result: Plan,
    checkpoint: Checkpoint,
    i: int,
    add_mixer: Callable[[Plan, Checkpoint, str, str], None],
) -> None:
    """A layer's norms, its mixer by `add_mixer` or its attention, and its MLP where it has one."""
    keys, layer, blk = result.keys, f"model.layers.{i}", f"blk.{i}"
    d_model, d_ff = keys["embedding_length"], keys["feed_forward_length"]
    add_norm(result, checkpoint, f"{layer}.norm", f"{blk}.attn_norm", d_model)
    if keys["attention.head_count"] and keys["attention.head_count"][i]:
        _add_attention(result, checkpoint, i)
    else:
        add_mixer(result, checkpoint, f"{layer}.mixer", blk)
    if d_ff:
        add_norm(result, checkpoint, f"{layer}.norm2", f"{blk}.ffn_norm", d_model)
        both = checkpoint.require(f"{layer}.mlp.fc1.weight", 2 * d_ff, d_model)
        # What is multiplied with the gate comes first.
        for index, part in enumerate(("up", "gate")):
            result.add(f"{blk}.ffn_{part}.weight", (d_ff, d_model), half(both, d_ff, index))
        add_linear(result, checkpoint, f"{layer}.mlp.fc2", f"{blk}.ffn_down", d_model, d_ff)
        result.remark("for keelback only: llama.cpp knows no Mamba with MLPs")


def _add_attention(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    """Queries, keys and values lie in one matrix here, and pass one convolution."""
    keys, mixer, blk = result.keys, f"model.layers.{i}.mixer", f"blk.{i}"
    d_model, d_head = keys["embedding_length"], keys["attention.key_length"]
    heads, key_heads = (keys[f"attention.{key}"][i] for key in ("head_count", "head_count_kv"))
    inner, rows = heads * d_head, (heads + 2 * key_heads) * d_head
    add_linear(result, checkpoint, f"{mixer}.in_proj", f"{blk}.attn_qkv", rows, d_model)
    if taps := keys.get("shortconv.l_cache"):
        add_linear(result, checkpoint, f"{mixer}.conv1d", f"{blk}.shortconv.conv", rows, taps)
    add_linear(result, checkpoint, f"{mixer}.out_proj", f"{blk}.attn_output", d_model, inner)
    result.remark("for keelback only: llama.cpp knows no Mamba with attention in some layers")
