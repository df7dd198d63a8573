"""OLMo-Hybrid: tiny checkpoints as the hub has them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiny import Family
from tiny_shapes import Shapes

_DEFAULTS: dict[str, Any] = {
    "architectures": ["OlmoHybridForCausalLM"],
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "attention_bias": False,
    "linear_allow_neg_eigval": True,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_theta": None,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def _shapes(c: dict[str, Any]) -> Shapes:
    hidden, middle = c["hidden_size"], c["intermediate_size"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        attends = c["layer_types"][i] == "full_attention" if c["layer_types"] else i % 4 == 3
        norms = ("attention_layer_norm", "feedforward_layer_norm")
        if attends:
            norms = ("post_attention_layernorm", "post_feedforward_layernorm")
        for norm in norms:
            yield at + f"{norm}.weight", (hidden,)
        yield from (_attention_shapes if attends else _mixer_shapes)(c, at)
        for part, *shape in (
            ("gate", middle, hidden), ("up", middle, hidden), ("down", hidden, middle),
        ):  # fmt: skip
            yield at + f"mlp.{part}_proj.weight", tuple(shape)
    yield "model.norm.weight", (hidden,)


def _attention_shapes(c: dict[str, Any], at: str) -> Shapes:
    hidden = c["hidden_size"]
    shared = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    for part, rows in (("q", hidden), ("k", shared), ("v", shared), ("o", hidden)):
        yield at + f"self_attn.{part}_proj.weight", (rows, hidden)
        if c["attention_bias"]:
            yield at + f"self_attn.{part}_proj.bias", (rows,)
    for part, rows in (("q", hidden), ("k", shared)):
        yield at + f"self_attn.{part}_norm.weight", (rows,)


def _mixer_shapes(c: dict[str, Any], at: str) -> Shapes:
    hidden, heads = c["hidden_size"], c["linear_num_value_heads"]
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    values = heads * c["linear_value_head_dim"]
    for part, rows in (("q", keys), ("k", keys), ("v", values)):
        yield at + f"linear_attn.{part}_proj.weight", (rows, hidden)
        yield at + f"linear_attn.{part}_conv1d.weight", (rows, 1, c["linear_conv_kernel_dim"])
    for part, rows in (("a", heads), ("b", heads), ("g", values)):
        yield at + f"linear_attn.{part}_proj.weight", (rows, hidden)
    yield at + "linear_attn.A_log", (heads,)
    yield at + "linear_attn.dt_bias", (heads,)
    yield at + "linear_attn.o_norm.weight", (c["linear_value_head_dim"],)
    yield at + "linear_attn.o_proj.weight", (hidden, values)


def in_memory(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers 5 has one convolution, and one name each for both norms of a layer."""
    memory = {}
    for name, values in tensors.items():
        name = name.replace("attention_layer_norm", "input_layernorm")
        name = name.replace("feedforward_layer_norm", "post_attention_layernorm")
        if name.endswith("q_conv1d.weight"):
            parts = [tensors[name.replace("q_conv", f"{part}_conv")] for part in "qkv"]
            memory[name.replace("q_conv", "conv")] = np.concatenate(parts)
        elif "_conv1d" not in name:
            memory[name] = values
    return memory


# fmt: off
FAMILIES = [
    Family("olmo_hybrid", _DEFAULTS, _shapes, [
        ("olmo-nope", 40, 61, {"num_attention_heads": 5, "num_key_value_heads": 5,
         "linear_num_key_heads": 5, "linear_num_value_heads": 5, "linear_key_head_dim": 14,
         "linear_value_head_dim": 20, "intermediate_size": 52}),
        ("olmo-rope", 48, 67, {"num_attention_heads": 4, "num_key_value_heads": 2,
         "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
         "linear_value_head_dim": 12, "linear_conv_kernel_dim": 3, "intermediate_size": 76,
         "rope_parameters": {"rope_theta": 300.0, "rope_type": "default"},
         "linear_allow_neg_eigval": False, "attention_bias": True, "rms_norm_eps": 1e-4,
         "num_hidden_layers": 5, "layer_types": None, "tie_word_embeddings": True,
         # Short values make the epsilon of the norm behind the recurrence visible.
         "gain": {"v_conv1d": 0.1}}),
        ("olmo-q8", 96, 97, {"num_attention_heads": 6, "num_key_value_heads": 6,
         "linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_key_head_dim": 32,
         "linear_value_head_dim": 64, "intermediate_size": 160}),
    ], in_memory=in_memory, said=("olmo-nope", "olmo-rope", "olmo-q8")),
]
# fmt: on
