"""flash-linear-attention's `kda` to GGUF `kda`: keys and names of Kimi Linear, where it has them.

llama.cpp has no such architecture. Keys that Kimi Linear has no need of are Gated DeltaNet's.
"""

from __future__ import annotations

from typing import Any

from .checkpoint import Checkpoint
from .config import Config
from .gated_deltanet import add_layers, attention_keys, attention_layers, common_keys, value_heads
from .kda_hybrids import Delta, add_mixer, lower_bound, positive_exp
from .plan import Plan, negative_exp

MODEL_TYPES = ("kda",)


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor."""
    config = checkpoint.config
    # Its presence decides, whatever safe_gate says.
    bounded = config.get("lower_bound") is not None
    delta = _delta(config, bounded)
    attention = attention_layers(config)
    keys = {
        **common_keys(checkpoint),
        **_keys(delta, config.flag("allow_neg_eigval", False)),
        **attention_keys(config, attention),
        "kda.safe_gate": bounded,
    }
    heads = keys["attention.head_count"] if attention else [0] * keys["block_count"]
    keys["attention.head_count"] = [count or delta.heads for count in heads]
    keys.setdefault("attention.head_count_kv", heads)
    if bounded:
        keys["kda.gate_lower_bound"] = lower_bound(config, "lower_bound", -5.0)
    result = Plan("kda", keys)
    result.remark("for keelback only: llama.cpp has no architecture for KDA without experts")
    add_layers(
        result, checkpoint, attention,
        lambda i: add_mixer(result, checkpoint, f"model.layers.{i}.attn", f"blk.{i}", delta),
    )  # fmt: skip
    return result


def _delta(config: Config, bounded: bool) -> Delta:
    key_heads, d_key = config.count("num_heads", 16), config.count("head_dim", 128)
    heads, d_value = value_heads(config, key_heads, d_key, 1)
    taps = config.count("conv_size", 4) if config.flag("use_short_conv", True) else None
    gates, rate = ("_proj.0", "_proj.1"), positive_exp if bounded else negative_exp
    return Delta(heads, d_value, key_heads, d_key, taps, gates, rate, (heads, 1))


def _keys(delta: Delta, negative: bool) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "kda.head_dim": delta.d_key,
        "ssm.group_count": delta.key_heads,
        "ssm.inner_size": delta.heads * delta.d_value,
        "ssm.allow_neg_eigval": negative,
    }
    return keys if delta.taps is None else {**keys, "ssm.conv_kernel": delta.taps}
