"""Jamba: Mamba-1 with norms inside, attention without positions, MLPs and experts by turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tiny import Family

Shapes = Iterator[tuple[str, tuple[int, ...]]]

DEFAULTS: dict[str, Any] = {
    "architectures": ["JambaForCausalLM"],
    "num_hidden_layers": 4,
    "attn_layer_offset": 1,
    "attn_layer_period": 4,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 44,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 4,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


def shapes(c: dict[str, Any]) -> Shapes:
    hidden = c["hidden_size"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        yield at + "pre_ff_layernorm.weight", (hidden,)
        if i % c["attn_layer_period"] == c["attn_layer_offset"]:
            keys = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
            for part, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
                yield at + f"self_attn.{part}_proj.weight", (rows, hidden)
        else:
            yield from _mixer(c, at + "mamba.")
        experts = c["num_experts"]
        if experts > 1 and i % c["expert_layer_period"] == c["expert_layer_offset"]:
            yield at + "feed_forward.router.weight", (experts, hidden)
            for expert in range(experts):
                yield from _mlp(c, at + f"feed_forward.experts.{expert}.")
        else:
            yield from _mlp(c, at + "feed_forward.")
    yield "model.final_layernorm.weight", (hidden,)


def _mlp(c: dict[str, Any], at: str) -> Shapes:
    hidden, middle = c["hidden_size"], c["intermediate_size"]
    for part in ("gate", "up"):
        yield at + f"{part}_proj.weight", (middle, hidden)
    yield at + "down_proj.weight", (hidden, middle)


def _mixer(c: dict[str, Any], at: str) -> Shapes:
    hidden, state, rank = c["hidden_size"], c["mamba_d_state"], c["mamba_dt_rank"]
    inner = c["mamba_expand"] * hidden
    yield at + "in_proj.weight", (2 * inner, hidden)
    yield at + "conv1d.weight", (inner, 1, c["mamba_d_conv"])
    yield at + "x_proj.weight", (rank + 2 * state, inner)
    yield at + "dt_proj.weight", (inner, rank)
    yield at + "dt_proj.bias", (inner,)
    yield at + "A_log", (inner, state)
    yield at + "D", (inner,)
    yield at + "out_proj.weight", (hidden, inner)
    for part, width in (("dt", rank), ("b", state), ("c", state)):
        yield at + f"{part}_layernorm.weight", (width,)
    if c["mamba_conv_bias"]:
        yield at + "conv1d.bias", (inner,)
    if c["mamba_proj_bias"]:
        yield at + "in_proj.bias", (2 * inner,)
        yield at + "out_proj.bias", (hidden,)


def in_memory(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers 5 keeps all experts of a layer in one tensor, gate above up."""
    kept = {name: value for name, value in tensors.items() if ".experts." not in name}
    for name in tensors:
        stem, expert, rest = name.partition(".experts.0.")
        if not expert or not rest.startswith("down"):
            continue
        count = sum(key.startswith(f"{stem}.experts.") for key in tensors) // 3
        every = [
            [tensors[f"{stem}.experts.{i}.{part}_proj.weight"] for i in range(count)]
            for part in ("gate", "up", "down")
        ]
        gate, up, down = map(np.stack, every)
        kept[f"{stem}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        kept[f"{stem}.experts.down_proj"] = down
    return kept


# fmt: off
FAMILIES = [
    Family(
        "jamba", DEFAULTS, shapes,
        [
            ("jamba-moe", 48, 61, {"gain": {"router": 3, "x_proj": 0.03}}),
            # Three taps, one key head, another eps, no experts, and one matrix for both ends.
            ("jamba-dense", 40, 53, {
                "num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 2,
                "num_attention_heads": 5, "num_key_value_heads": 1, "num_experts": 1,
                "num_experts_per_tok": 1, "mamba_d_conv": 3, "mamba_d_state": 8,
                "mamba_dt_rank": 3, "rms_norm_eps": 1e-4, "tie_word_embeddings": True,
                "gain": {"x_proj": 0.03},
            }),
            # Experts in every layer, more of them, and an inner size that is not twice the other:
            # llama.cpp ends at such a file, with all that runs beside it.
            ("jamba-bias", 36, 59, {
                "num_hidden_layers": 2, "attn_layer_period": 2, "expert_layer_period": 1,
                "expert_layer_offset": 0, "num_attention_heads": 3, "num_key_value_heads": 3,
                "num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 20,
                "mamba_expand": 3, "mamba_proj_bias": True, "mamba_conv_bias": False,
                "gain": {"router": 3},
            }),
            ("jamba-q8", 64, 67, {
                "intermediate_size": 96, "mamba_dt_rank": 32, "gain": {"router": 3},
            }),
        ],
        in_memory=in_memory,
        llamacpp=("jamba-moe", "jamba-dense", "jamba-q8"),
    )
]
# fmt: on
