"""Shapes of hybrids that people run: Qwen3.5, Granite 4 H, and mixtures cut to a few layers.

Sizes are those of the released models. Of the mixtures a few layers stand for all, and a part of
the vocabulary for the whole, so that experts weigh as much as they do there.
"""

from __future__ import annotations

from typing import Any

from modelfiles import (
    QWEN,
    Layer,
    Shape,
    decay_by_head,
    normal,
    ones,
    step_bias,
    taps,
    zeros,
)

#: The size of the vocabulary of Granite 4.
GRANITE = 100_352
HEAD, TAPS = 128, 4


def _mlp(width: int, d_ff: int, suffix: str = "") -> Layer:
    return {
        f"ffn_gate{suffix}.weight": ((d_ff, width), normal),
        f"ffn_up{suffix}.weight": ((d_ff, width), normal),
        f"ffn_down{suffix}.weight": ((width, d_ff), normal),
    }


def _experts(width: int, d_ff: int, count: int, shared: int) -> Layer:
    return {
        "ffn_gate_inp.weight": ((count, width), normal),
        "ffn_gate_exps.weight": ((count, d_ff, width), normal),
        "ffn_up_exps.weight": ((count, d_ff, width), normal),
        "ffn_down_exps.weight": ((count, width, d_ff), normal),
        **_mlp(width, shared, "_shexp"),
    }


def _attention(width: int, queries: int, keys: int, values: int) -> Layer:
    """queries: rows of that projection; values: columns of the last one."""
    return {
        "attn_q.weight": ((queries, width), normal),
        "attn_k.weight": ((keys, width), normal),
        "attn_v.weight": ((keys, width), normal),
        "attn_output.weight": ((width, values), normal),
    }


def _delta(width: int, key_heads: int, heads: int) -> Layer:
    channels, inner = (2 * key_heads + heads) * HEAD, heads * HEAD
    return {
        "attn_qkv.weight": ((channels, width), normal),
        "attn_gate.weight": ((inner, width), normal),
        "ssm_conv1d.weight": ((channels, TAPS), taps),
        "ssm_alpha.weight": ((heads, width), normal),
        "ssm_beta.weight": ((heads, width), normal),
        "ssm_a": ((heads,), decay_by_head),
        "ssm_dt.bias": ((heads,), step_bias),
        "ssm_norm.weight": ((HEAD,), ones),
        "ssm_out.weight": ((width, inner), normal),
    }


def _mamba2(width: int, heads: int, states: int) -> Layer:
    inner = 2 * width
    channels = inner + 2 * states
    return {
        "ssm_in.weight": ((inner + channels + heads, width), normal),
        "ssm_conv1d.weight": ((channels, TAPS), taps),
        "ssm_conv1d.bias": ((channels,), zeros),
        "ssm_dt.bias": ((heads,), step_bias),
        "ssm_a": ((heads, 1), decay_by_head),
        "ssm_d": ((heads, 1), ones),
        "ssm_norm.weight": ((1, inner), ones),
        "ssm_out.weight": ((width, inner), normal),
    }


def qwen35(
    width: int, layers: int, queries: int, keys: int, heads: int, d_ff: int, experts: int = 0,
    vocabulary: int = QWEN,
) -> Shape:  # fmt: skip
    """Three layers of Gated DeltaNet, then one of attention. experts: eight of these are used."""
    d_head, key_heads = 256, 16
    common: dict[str, Any] = {
        "context_length": 262_144, "embedding_length": width, "block_count": layers,
        "attention.head_count": queries, "attention.head_count_kv": keys,
        "attention.key_length": d_head, "attention.value_length": d_head,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0], "rope.freq_base": 1e7,
        "ssm.conv_kernel": TAPS, "ssm.state_size": HEAD, "ssm.group_count": key_heads,
        "ssm.time_step_rank": heads, "ssm.inner_size": heads * HEAD,
        "full_attention_interval": 4,
    }  # fmt: skip
    if experts:
        common |= {
            "expert_count": experts, "expert_used_count": 8, "expert_feed_forward_length": d_ff,
            "expert_shared_feed_forward_length": d_ff,
        }  # fmt: skip
        feed = _experts(width, d_ff, experts, d_ff)
        feed["ffn_gate_inp_shexp.weight"] = ((width,), normal)
    else:
        common["feed_forward_length"], feed = d_ff, _mlp(width, d_ff)
    norms: Layer = {
        f"{name}.weight": ((width,), ones) for name in ("attn_norm", "post_attention_norm")
    }
    attention = {
        **_attention(width, 2 * queries * d_head, keys * d_head, queries * d_head),
        "attn_q_norm.weight": ((d_head,), ones), "attn_k_norm.weight": ((d_head,), ones),
    }  # fmt: skip
    mixers = [_delta(width, key_heads, heads)] * 3 + [attention]
    name = "qwen35moe" if experts else "qwen35"
    return Shape(
        name, common, [{**norms, **mixers[i % 4], **feed} for i in range(layers)], vocabulary
    )


def granite(
    width: int, attends: list[bool], heads: int, d_ff: int, experts: int = 0, shared: int = 0,
    vocabulary: int = GRANITE,
) -> Shape:  # fmt: skip
    """Mamba-2, attention where it is said, and an MLP or experts, of which six are used."""
    queries, keys, states = 12, 4, 128
    d_head = width // queries
    common: dict[str, Any] = {
        "context_length": 1 << 20, "embedding_length": width, "block_count": len(attends),
        "feed_forward_length": d_ff, "attention.head_count": queries,
        "attention.head_count_kv": [keys if attention else 0 for attention in attends],
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": d_head,
        "rope.freq_base": 10000.0, "rope.scaling.finetuned": False,
        "attention.scale": 0.015625, "embedding_scale": 12.0, "residual_scale": 0.246,
        "logit_scale": 3.0, "ssm.conv_kernel": TAPS, "ssm.state_size": states,
        "ssm.group_count": 1, "ssm.inner_size": 2 * width, "ssm.time_step_rank": heads,
        "expert_count": experts, "expert_used_count": 6 if experts else 0,
        "expert_shared_feed_forward_length": shared or d_ff,
    }  # fmt: skip
    feed = _experts(width, d_ff, experts, shared) if experts else _mlp(width, d_ff)
    norms: Layer = {f"{name}.weight": ((width,), ones) for name in ("attn_norm", "ffn_norm")}
    attention = _attention(width, width, keys * d_head, width)
    mixers = (_mamba2(width, heads, states), attention)
    layers = [{**norms, **mixers[attention], **feed} for attention in attends]
    return Shape("granitehybrid", common, layers, vocabulary)


HYBRIDS = {
    "qwen35-0.8b": qwen35(1024, 24, 8, 2, 16, 3584),
    "granite-350m": granite(768, [i in (10, 13, 17, 27) for i in range(32)], 48, 2048),
    "granite-moe": granite(1536, [i == 5 for i in range(8)], 48, 512, 64, 1024, 20_480),
    "qwen35-moe": qwen35(2048, 4, 16, 2, 32, 512, 256, 24_576),
}
