"""Hugging Face `olmo_hybrid` to GGUF `olmo-hybrid`.

llama.cpp has no such architecture; keys and tensor names are those of its nearest kin, `qwen35` for
the layers of Gated DeltaNet and `olmo2` for those of attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .checkpoint import Checkpoint
from .config import Config
from .delta import FLA, add_mixer, tiled
from .experts import NAMES
from .layers import (
    add_attention,
    add_ends,
    add_mlp,
    add_norm,
    head_counts,
    head_length,
    layer_types,
)
from .plan import Part, Plan
from .rope import rope_keys, rope_of
from .source import Source, rows_of

MODEL_TYPES = ("olmo_hybrid",)

#: For each kind of layer, the norm's name in a GGUF file, and what releases have called it. Layers
#: of attention saved by transformers 5 call their first as those of Gated DeltaNet call the second.
_NORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "linear_attention": {
        "attn_norm": ("attention_layer_norm", "input_layernorm"),
        "ffn_norm": ("feedforward_layer_norm", "post_attention_layernorm"),
    },
    "full_attention": {
        "post_attention_norm": ("post_attention_layernorm", "feedforward_layer_norm"),
        "post_ffw_norm": ("post_feedforward_layernorm",),
    },
}


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor."""
    config = checkpoint.config
    config.one_of("hidden_act", "silu", "silu", "swish")
    kinds = layer_types(config) or _every_fourth(config.count("num_hidden_layers"))
    keys = {
        "context_length": config.count("max_position_embeddings", 65536),
        "embedding_length": config.count("hidden_size"),
        "block_count": len(kinds),
        "feed_forward_length": config.count("intermediate_size", 11008),
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-6),
        **_attention_keys(config, kinds),
        **_mixer_keys(config),
    }
    result = Plan("olmo-hybrid", keys)
    result.remark("for keelback only: llama.cpp has no architecture for OLMo-Hybrid")
    add_ends(result, checkpoint, "model.embed_tokens.weight", "model.norm.weight")
    for i, kind in enumerate(kinds):
        _add_layer(result, checkpoint, i, kind)
    return result


def _every_fourth(layers: int) -> list[str]:
    """The kinds of layers where config does not say: one is of attention in any case."""
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
    return kinds if layers > 3 else [*kinds[:-1], "full_attention"]


def _attention_keys(config: Config, kinds: list[str]) -> dict[str, Any]:
    heads, key_heads = head_counts(config, 30)
    d_head = head_length(config, heads)
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": [key_heads if k == "full_attention" else 0 for k in kinds],
        "attention.key_length": d_head,
        "attention.value_length": d_head,
        **(rope_keys(config, d_head, 1e4) if _turns(config) else {}),
    }


def _turns(config: Config) -> bool:
    """Whether heads are turned; a null in place of the angles says that they are not.

    The released model has `rope_theta` and `rope_parameters` null. Where both are missing, and not
    null, transformers turns heads with its default.
    """
    turned = rope_of(config).get("rope_theta") is not None
    inner = config.get("rope_parameters", {})
    if "rope_theta" in inner:
        return inner["rope_theta"] is not None
    nulls = (config.values.get(key, "") for key in ("rope_theta", "rope_parameters"))
    return turned or None not in nulls


def _mixer_keys(config: Config) -> dict[str, Any]:
    heads = config.count("num_attention_heads", 30)
    names = "linear_num_value_heads", "linear_num_key_heads"
    heads, key_heads = config.multiple(*names, heads, heads)
    d_key = int(0.75 * config.count("hidden_size") / key_heads)
    d_key = config.count("linear_key_head_dim", d_key)
    return {
        "ssm.conv_kernel": config.count("linear_conv_kernel_dim", 4),
        "ssm.inner_size": heads * config.count("linear_value_head_dim", 2 * d_key),
        "ssm.state_size": d_key,
        "ssm.group_count": key_heads,
        "ssm.time_step_rank": heads,
        "ssm.allow_neg_eigval": config.flag("linear_allow_neg_eigval", True),
    }


def _add_layer(result: Plan, checkpoint: Checkpoint, i: int, kind: str) -> None:
    keys, layer, blk = result.keys, f"model.layers.{i}", f"blk.{i}"
    d_model = keys["embedding_length"]
    for gguf, names in _NORMS[kind].items():
        theirs = checkpoint.first(*(f"{layer}.{name}" for name in names))
        add_norm(result, checkpoint, theirs, f"{blk}.{gguf}", d_model)
    if kind == "full_attention":
        _add_attention(result, checkpoint, i)
    else:
        mixer = f"{layer}.linear_attn"
        without_conv = {gguf: names for gguf, names in FLA.items() if gguf != "ssm_conv1d"}
        add_mixer(result, checkpoint, mixer, blk, without_conv)
        _add_conv(result, checkpoint, mixer, blk)
    add_mlp(result, checkpoint, f"{layer}.mlp", blk, keys["feed_forward_length"], d_model, NAMES)


def _add_attention(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys, attn, blk = result.keys, f"model.layers.{i}.self_attn", f"blk.{i}"
    d_model, d_head = keys["embedding_length"], keys["attention.key_length"]
    counts = keys["attention.head_count"], keys["attention.head_count_kv"][i]
    add_attention(result, checkpoint, attn, blk, d_model, counts, d_head)
    for name, count in zip("qk", counts, strict=True):
        hf, gguf = f"{attn}.{name}_norm", f"{blk}.attn_{name}_norm"
        add_norm(result, checkpoint, hf, gguf, count * d_head)


def _add_conv(result: Plan, checkpoint: Checkpoint, mixer: str, blk: str) -> None:
    """The convolution of queries, keys and values.

    transformers 5 saves it in three equal parts, wherever the values begin.
    """
    keys = result.keys
    heads, d_inner = keys["ssm.time_step_rank"], keys["ssm.inner_size"]
    width, taps = keys["ssm.group_count"] * keys["ssm.state_size"], keys["ssm.conv_kernel"]
    channels = 2 * width + d_inner
    counts = [width, width, d_inner]
    if rows_of(checkpoint.require(f"{mixer}.q_conv1d.weight")) != width:
        third = -(-channels // 3)
        counts = [third, third, channels - 2 * third]
    sources = [
        checkpoint.require(f"{mixer}.{part}_conv1d.weight", count, taps)
        for part, count in zip("qkv", counts, strict=True)
    ]
    order = np.arange(channels)
    by_row = tiled(keys["ssm.group_count"], heads, d_inner // heads)
    if by_row is not None:
        order[2 * width :] = 2 * width + by_row
    result.add(f"{blk}.ssm_conv1d.weight", (channels, taps), *_taken(sources, order))


def _taken(sources: list[Source], order: np.ndarray) -> list[Part]:
    """Rows of sources that lie one behind the other, in an order."""
    starts = np.cumsum([0, *map(rows_of, sources)])
    owner = np.searchsorted(starts, order, side="right") - 1
    cuts = np.flatnonzero(np.diff(owner)) + 1
    return [
        Part(sources[own[0]], rows=rows - starts[own[0]])
        for rows, own in zip(np.split(order, cuts), np.split(owner, cuts), strict=True)
    ]
