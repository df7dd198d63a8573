"""Falcon-H1: Mamba-2 beside attention in every layer, and multipliers in all places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tiny import Family

Shapes = Iterator[tuple[str, tuple[int, ...]]]

DEFAULTS: dict[str, Any] = {
    "architectures": ["FalconH1ForCausalLM"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 52,
    "attention_bias": False,
    "mlp_bias": False,
    "projectors_bias": False,
    "mamba_chunk_size": 16,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 8,
    "mamba_d_ssm": 72,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 9,
    "mamba_norm_before_gate": False,
    "mamba_proj_bias": False,
    "mamba_rms_norm": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000000000.0,
    # Multipliers that would be missed, of the size of real ones.
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.7,
    "embedding_multiplier": 3.7,
    "key_multiplier": 0.4,
    "lm_head_multiplier": 0.3,
    "mlp_multipliers": [0.6, 0.45],
    "ssm_in_multiplier": 1.2,
    "ssm_multipliers": [0.7, 1.4, 0.6, 1.6, 0.8],
    "ssm_out_multiplier": 0.55,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


def shapes(c: dict[str, Any]) -> Shapes:
    hidden, middle = c["hidden_size"], c["intermediate_size"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        yield from _mixer(c, at + "mamba.")
        queries = c["num_attention_heads"] * c["head_dim"]
        keys = c["num_key_value_heads"] * c["head_dim"]
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield from _linear(at + f"self_attn.{part}_proj", rows, hidden, c["attention_bias"])
        yield from _linear(at + "self_attn.o_proj", hidden, queries, c["attention_bias"])
        yield at + "pre_ff_layernorm.weight", (hidden,)
        for part, *shape in (
            ("gate", middle, hidden), ("up", middle, hidden), ("down", hidden, middle),
        ):  # fmt: skip
            yield from _linear(at + f"feed_forward.{part}_proj", *shape, c["mlp_bias"])
    yield "model.final_layernorm.weight", (hidden,)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _mixer(c: dict[str, Any], at: str) -> Shapes:
    hidden, heads, inner = c["hidden_size"], c["mamba_n_heads"], c["mamba_d_ssm"]
    conv = inner + 2 * c["mamba_n_groups"] * c["mamba_d_state"]
    yield from _linear(at + "in_proj", inner + conv + heads, hidden, c["mamba_proj_bias"])
    yield at + "conv1d.weight", (conv, 1, c["mamba_d_conv"])
    if c["mamba_conv_bias"]:
        yield at + "conv1d.bias", (conv,)
    for vector in ("dt_bias", "A_log", "D"):
        yield at + vector, (heads,)
    if c["mamba_rms_norm"]:
        yield at + "norm.weight", (inner,)
    yield from _linear(at + "out_proj", hidden, inner, c["projectors_bias"])


# fmt: off
FAMILIES = [
    Family(
        "falcon_h1", DEFAULTS, shapes,
        [
            ("falcon-h1-plain", 40, 61, {}),
            # A norm behind the gate, in groups.
            ("falcon-h1-norm", 44, 67, {
                "num_hidden_layers": 3, "mamba_rms_norm": True, "mamba_n_groups": 2,
                "mamba_n_heads": 6, "mamba_d_head": 12, "mamba_d_conv": 3, "mamba_d_state": 20,
                "rms_norm_eps": 1e-4, "rope_theta": 500.0,
            }),
            # A norm before the gate, and biases wherever there can be some.
            ("falcon-h1-bias", 36, 59, {
                "mamba_rms_norm": True, "mamba_norm_before_gate": True, "attention_bias": True,
                "mlp_bias": True, "projectors_bias": True, "mamba_proj_bias": True,
                "mamba_conv_bias": False, "num_key_value_heads": 1, "head_dim": 10,
            }),
            # One matrix for both ends, multiplied in two ways, and scaled rotation: their converter
            # sees neither.
            ("falcon-h1-yarn", 48, 53, {
                "rope_theta": 20.0, "tie_word_embeddings": True, "mlp_bias": True,
                "rope_scaling": {
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                },
            }),
            ("falcon-h1-q8", 64, 97, {
                "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
                "intermediate_size": 96, "mamba_d_ssm": 96, "mamba_n_heads": 6,
                "mamba_d_head": 16, "embedding_multiplier": 0.8, "lm_head_multiplier": 0.8,
                "tie_word_embeddings": True,
            }),
        ],
        llamacpp=("falcon-h1-plain", "falcon-h1-norm", "falcon-h1-q8"),
        misread=("falcon-h1-yarn",),
        said=("falcon-h1-bias",),
    )
]
# fmt: on
