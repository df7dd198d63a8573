"""Hugging Face `lfm2` and `lfm2_moe` to GGUF `lfm2` and `lfm2moe`."""

from __future__ import annotations

from typing import Any

from ..kernels.errors import UnsupportedModel
from .checkpoint import Checkpoint
from .config import Config
from .experts import NAMES, NUMBERED, add_experts, experts_used
from .layers import (
    add_attention,
    add_ends,
    add_linear,
    add_mlp,
    add_norm,
    head_counts,
    head_length,
    layer_types,
)
from .plan import Part, Plan
from .rope import rope_keys

MODEL_TYPES = ("lfm2", "lfm2_moe")
#: What the authors call it.
SPELLINGS = {"tie_word_embeddings": "tie_embedding"}

_KINDS = {"full_attention": ("full_attention",), "conv": ("conv",)}
#: The value of `expert_gating_func` for sigmoids.
_SIGMOID = 2


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of `lfm2`."""
    config = checkpoint.config
    if not config.flag("is_causal", True):
        raise UnsupportedModel(
            f"{config.path}: is_causal is false; the model reads text and writes none: take a "
            "causal language model"
        )
    mixed = config.get("model_type") == "lfm2_moe"
    keys = {
        "block_count": config.count("num_hidden_layers"),
        "context_length": config.count("max_position_embeddings", 128000),
        "embedding_length": config.count("hidden_size"),
        "attention.layer_norm_rms_epsilon": config.number("norm_eps", 1e-5),
        "shortconv.l_cache": config.count("conv_L_cache", 3),
        **_attention_keys(config),
        **(_expert_keys(config) if mixed else _mlp_keys(checkpoint)),
    }
    result = Plan("lfm2moe" if mixed else "lfm2", keys)
    if mixed:
        _remark_router(result)
    add_ends(
        result, checkpoint, "model.embed_tokens.weight", "model.embedding_norm.weight",
        target="token_embd_norm.weight",
    )  # fmt: skip
    for i in range(keys["block_count"]):
        _add_layer(result, checkpoint, i)
    return result


def _attention_keys(config: Config) -> dict[str, Any]:
    heads, key_heads = head_counts(config, 32, 8)
    d_head = head_length(config, heads)
    rope = rope_keys(config, d_head, 1e6)
    # Whole heads are turned, which llama.cpp takes for granted.
    del rope["rope.dimension_count"]
    lengths = {"attention.key_length": d_head, "attention.value_length": d_head}
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": [key_heads if attends else 0 for attends in _attends(config)],
        **(lengths if config.get("head_dim") is not None else {}),
        **rope,
    }


def _attends(config: Config) -> list[bool]:
    """For each layer, whether it is one of attention."""
    types, layers = layer_types(config, _KINDS), range(config.count("num_hidden_layers"))
    if types is not None:
        return [kind == "full_attention" for kind in types]
    places = config.places("full_attn_idxs", layers)
    return [i in places for i in layers]


def _mlp_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """The width that config gives is adjusted in ways that differ; the tensors have the right one.

    Config may also call it `block_ff_dim`.
    """
    return {"feed_forward_length": Part(checkpoint.require(_mlp(0) + ".w1.weight")).count}


def _expert_keys(config: Config) -> dict[str, Any]:
    experts = config.count("num_experts", 32)
    keys: dict[str, Any] = {
        "feed_forward_length": config.count("intermediate_size", 7168),
        "expert_feed_forward_length": config.count("moe_intermediate_size", 1792),
        "expert_count": experts,
        "expert_used_count": experts_used(config, experts, 4),
        "expert_gating_func": _SIGMOID,
        "leading_dense_block_count": config.count("num_dense_layers", 2, least=0),
    }
    # Keys that llama.cpp does not read for this model: only where they say anything.
    if (scale := config.number("routed_scaling_factor", 1.0)) != 1:
        keys["expert_weights_scale"] = scale
    if not config.flag("norm_topk_prob", True):
        keys["expert_weights_norm"] = False
    return keys


def _remark_router(result: Plan) -> None:
    for key in ("expert_weights_scale", "expert_weights_norm"):
        if key in result.keys:
            result.remark(
                f"for keelback only: {key} is {result.keys[key]}; llama.cpp takes experts as "
                "strong as their share of those chosen, and its logits will differ"
            )


def _add_layer(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    layer, blk, d_model = f"model.layers.{i}", f"blk.{i}", result.keys["embedding_length"]
    add_norm(result, checkpoint, f"{layer}.operator_norm", f"{blk}.attn_norm", d_model)
    add_norm(result, checkpoint, f"{layer}.ffn_norm", f"{blk}.ffn_norm", d_model)
    if result.keys["attention.head_count_kv"][i]:
        _add_attention(result, checkpoint, i)
    else:
        _add_short_conv(result, checkpoint, i)
    if i >= result.keys.get("leading_dense_block_count", i + 1):
        _add_experts(result, checkpoint, i)
    else:
        d_ff = result.keys["feed_forward_length"]
        add_mlp(result, checkpoint, _mlp(i), blk, d_ff, d_model, NUMBERED)


def _add_attention(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys, attn, blk = result.keys, f"model.layers.{i}.self_attn", f"blk.{i}"
    d_model, heads = keys["embedding_length"], keys["attention.head_count"]
    d_head = keys.get("attention.key_length", d_model // heads)
    counts = heads, keys["attention.head_count_kv"][i]
    add_attention(result, checkpoint, attn, blk, d_model, counts, d_head, output="out_proj")
    for name in "qk":
        add_norm(result, checkpoint, f"{attn}.{name}_layernorm", f"{blk}.attn_{name}_norm", d_head)
    if heads * d_head != d_model:
        result.remark(
            f"for keelback only: {heads} heads of {d_head} do not make the hidden size {d_model}"
        )


def _add_short_conv(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    d_model, taps = result.keys["embedding_length"], result.keys["shortconv.l_cache"]
    conv, target = f"model.layers.{i}.conv", f"blk.{i}.shortconv"
    add_linear(result, checkpoint, f"{conv}.in_proj", f"{target}.in_proj", 3 * d_model, d_model)
    add_linear(result, checkpoint, f"{conv}.conv", f"{target}.conv", d_model, taps)
    add_linear(result, checkpoint, f"{conv}.out_proj", f"{target}.out_proj", d_model, d_model)
    if checkpoint.find(f"{conv}.conv.bias") is not None:
        result.remark("for keelback only: the short convolutions have biases (shortconv.*.bias)")


def _add_experts(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys, blk = result.keys, f"blk.{i}"
    d_model, experts = keys["embedding_length"], keys["expert_count"]
    add_linear(result, checkpoint, f"{_mlp(i)}.gate", f"{blk}.ffn_gate_inp", experts, d_model)
    width, prefix = keys["expert_feed_forward_length"], f"{_mlp(i)}.experts"
    stacked = checkpoint.find(f"{prefix}.down_proj") is not None
    names = NAMES if stacked else NUMBERED
    add_experts(result, checkpoint, blk, prefix, experts, width, d_model, names)
    # llama.cpp demands what is added for the choice, so a missing one becomes zeros.
    bias = None
    if checkpoint.config.flag("use_expert_bias", True):
        bias = checkpoint.require(f"{_mlp(i)}.expert_bias", experts)
    result.add(f"{blk}.exp_probs_b.bias", (experts,), *([] if bias is None else [bias]))


def _mlp(i: int) -> str:
    return f"model.layers.{i}.feed_forward"
