"""flash-linear-attention's `gated_deltanet` to GGUF `gated-deltanet`.

llama.cpp has no such architecture; keys and tensor names are those of its nearest kin, `qwen35`,
and value heads are tiled as there: value head j reads key head j mod key heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from ..kernels.errors import InvalidFile, UnsupportedModel
from .checkpoint import Checkpoint
from .config import Config
from .delta import FLA, add_mixer
from .experts import half
from .layers import add_attention, add_ends
from .plan import Part, Plan

MODEL_TYPES = ("gated_deltanet",)
CLASSES = {"GatedDeltaNetForCausalLM": "gated_deltanet"}
#: Keys of layers of attention, and what messages call them.
_ATTENTION = {
    key: f"attn.{key}" for key in ("num_heads", "num_kv_heads", "rope_theta", "window_size")
}


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor."""
    config = checkpoint.config
    config.one_of("output_gate_activation", "swish", "swish", "silu")
    attention = attention_layers(config)
    keys = {**common_keys(checkpoint), **_keys(config), **attention_keys(config, attention)}
    result = Plan("gated-deltanet", keys)
    result.remark(
        "for keelback only: llama.cpp has no architecture for Gated DeltaNet of "
        "flash-linear-attention"
    )
    add_layers(result, checkpoint, attention, lambda i: _add_mixer(result, checkpoint, i))
    return result


def common_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """Keys of what stands around the mixers, in all models of flash-linear-attention.

    Raises UnsupportedModel for residuals that attend.
    """
    config = checkpoint.config
    config.one_of("hidden_act", "swish", "swish", "silu")
    if config.get("attnres_block_size"):
        raise UnsupportedModel(
            f"{config.path}: attnres_block_size asks for residuals that attend to earlier layers, "
            "which keelback cannot run"
        )
    down_proj = checkpoint.require("model.layers.0.mlp.down_proj.weight")
    return {
        "context_length": config.count("max_position_embeddings", 2048),
        "embedding_length": config.count("hidden_size"),
        "block_count": config.count("num_hidden_layers"),
        "feed_forward_length": Part(down_proj).width,
        "attention.layer_norm_rms_epsilon": config.number("norm_eps", 1e-6),
    }


def add_layers(
    result: Plan,
    checkpoint: Checkpoint,
    attention: Collection[int],
    add_mixer: Callable[[int], None],
) -> None:
    """The ends and all layers; add_mixer: adds that of a layer which is none of attention."""
    add_ends(result, checkpoint, "model.embeddings.weight", "model.norm.weight")
    for i in range(result.keys["block_count"]):
        if i in attention:
            _add_attention(result, checkpoint, i)
        else:
            add_mixer(i)
        _add_mlp(result, checkpoint, i)


def attention_layers(config: Config) -> dict[int, Config]:
    """What `attn` says of each layer that has attention: for all alike, or a list for several.

    Raises InvalidFile where it names no layers, some that are not there, or one twice.
    """
    given, layers = config.get("attn", []), config.count("num_hidden_layers")
    found: dict[int, Config] = {}
    for values in given if isinstance(given, list) else [given]:
        places = values.get("layers") if isinstance(values, dict) else None
        if not isinstance(places, list) or any(type(i) is not int for i in places):
            raise InvalidFile(f"{config.path}: attn names no list of layers")
        for i in places:
            if i in found or not 0 <= i < layers:
                raise InvalidFile(
                    f"{config.path}: attn names layer {i} of {layers}, or names it twice"
                )
            named = {f"attn.{key}": value for key, value in values.items()}
            found[i] = Config(config.path, named, _ATTENTION)
    return found


def attention_keys(config: Config, attention: dict[int, Config]) -> dict[str, Any]:
    """Keys of the layers of attention: a list of what they are, for each layer.

    Raises InvalidFile for heads that do not go together, UnsupportedModel for angles or windows
    that differ from layer to layer.
    """
    if not attention:
        return {"attention.head_count": 0}
    layers, d_model = config.count("num_hidden_layers"), config.count("hidden_size")
    heads, key_heads, windows = [0] * layers, [0] * layers, [0] * layers
    for i, given in attention.items():
        heads[i], key_heads[i] = given.multiple("num_heads", "num_kv_heads")
        if d_model % (2 * heads[i]):
            raise InvalidFile(
                f"{config.path}: {heads[i]} heads of attn do not go with hidden_size {d_model}"
            )
        windows[i] = 0 if given.get("window_size") is None else given.count("window_size")
    thetas = {given.number("rope_theta", 10000.0) for given in attention.values()}
    sizes = {window for window in windows if window}
    if len(thetas) > 1 or len(sizes) > 1:
        raise UnsupportedModel(
            f"{config.path}: attn gives layers several values of rope_theta or window_size; "
            "keelback runs one of each"
        )
    keys = {
        "attention.head_count": heads, "attention.head_count_kv": key_heads,
        "rope.freq_base": thetas.pop(),
    }  # fmt: skip
    if sizes:
        keys["attention.sliding_window"] = sizes.pop()
        keys["attention.sliding_window_pattern"] = [window > 0 for window in windows]
    return keys


def value_heads(config: Config, key_heads: int, d_key: int, expand: float) -> tuple[int, int]:
    """Heads of values, and how many values each has. expand: of a silent config.

    Raises InvalidFile where key heads do not share them evenly, or the values are no whole number.
    """
    heads = config.count("num_v_heads", key_heads)
    d_value = d_key * config.number("expand_v", expand)
    if heads % key_heads or not d_value.is_integer():
        raise InvalidFile(
            f"{config.path}: {heads} value heads of {d_value} do not go with num_heads {key_heads}"
        )
    return heads, int(d_value)


def _keys(config: Config) -> dict[str, Any]:
    key_heads, d_key = config.count("num_heads", 6), config.count("head_dim", 256)
    heads, d_value = value_heads(config, key_heads, d_key, 2)
    keys = {
        "ssm.inner_size": heads * d_value,
        "ssm.state_size": d_key,
        "ssm.group_count": key_heads,
        "ssm.time_step_rank": heads,
        "ssm.allow_neg_eigval": config.flag("allow_neg_eigval", False),
        "ssm.use_gate": config.flag("use_gate", True),
    }
    if config.flag("use_short_conv", True):
        keys["ssm.conv_kernel"] = config.count("conv_size", 4)
    return keys


def _add_mixer(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    names = dict(FLA)
    if "ssm.conv_kernel" not in result.keys:
        del names["ssm_conv1d"]
    if not result.keys["ssm.use_gate"]:
        del names["attn_gate"]
    add_mixer(result, checkpoint, f"model.layers.{i}.attn", f"blk.{i}", names)


def _add_attention(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys, attn, blk = result.keys, f"model.layers.{i}.attn", f"blk.{i}"
    d_model = keys["embedding_length"]
    counts = keys["attention.head_count"][i], keys["attention.head_count_kv"][i]
    add_attention(result, checkpoint, attn, blk, d_model, counts, d_model // counts[0])


def _add_mlp(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    d_model, d_ff = result.keys["embedding_length"], result.keys["feed_forward_length"]
    layer, blk = f"model.layers.{i}", f"blk.{i}"
    for hf, gguf in (("attn_norm", "attn_norm"), ("mlp_norm", "ffn_norm")):
        norm = checkpoint.require(f"{layer}.{hf}.weight", d_model)
        result.add(f"{blk}.{gguf}.weight", (d_model,), norm)
    up = checkpoint.find(f"{layer}.mlp.up_proj.weight", d_ff, d_model)
    if up is not None:
        gate = Part(checkpoint.require(f"{layer}.mlp.gate_proj.weight", d_ff, d_model))
        parts = {"gate": gate, "up": Part(up)}
    else:
        # Before its first release the library kept both in one matrix.
        fused = checkpoint.require(f"{layer}.mlp.gate_proj.weight", 2 * d_ff, d_model)
        parts = {"gate": half(fused, d_ff, 0), "up": half(fused, d_ff, 1)}
    for name, part in parts.items():
        result.add(f"{blk}.ffn_{name}.weight", (d_ff, d_model), part)
    down = checkpoint.require(f"{layer}.mlp.down_proj.weight", d_model, d_ff)
    result.add(f"{blk}.ffn_down.weight", (d_model, d_ff), down)
