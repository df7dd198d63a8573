"""Nemotron-H: in every layer Mamba-2, attention, an MLP or experts alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from tiny import Family

Shapes = Iterator[tuple[str, tuple[int, ...]]]

DEFAULTS: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "chunk_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 12,
    "intermediate_size": 52,
    "layer_norm_epsilon": 1e-5,
    # llama.cpp's converter wants a product that 64 divides.
    "mamba_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_groups": 2,
    # Published configs have this beside the other eps; llama.cpp reads it.
    "norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000,
    "ssm_state_size": 16,
    # Below this transformers bounds time steps in prompts, and only there.
    "time_step_min": 1e-9,
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
    "n_group": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
    "gain": {"gate.weight": 2},
}
#: The marks of `hybrid_override_pattern`.
MARKS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def pattern(marks: str, **over: Any) -> dict[str, Any]:
    return {"hybrid_override_pattern": marks, "num_hidden_layers": len(marks), **over}


def shapes(c: dict[str, Any]) -> Shapes:
    hidden = c["hidden_size"]
    kinds = c.get("layers_block_type") or [MARKS[mark] for mark in c["hybrid_override_pattern"]]
    layers = {
        "linear_attention": _mamba, "full_attention": _attention, "mlp": _mlp, "moe": _experts
    }  # fmt: skip
    yield "backbone.embeddings.weight", (c["vocab_size"], hidden)
    for i, kind in enumerate(kinds):
        yield f"backbone.layers.{i}.norm.weight", (hidden,)
        yield from layers[kind](c, f"backbone.layers.{i}.mixer.")
    yield "backbone.norm_f.weight", (hidden,)


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _mamba(c: dict[str, Any], at: str) -> Shapes:
    heads, bias = c["mamba_num_heads"], c["use_bias"]
    inner = heads * c["mamba_head_dim"]
    conv = inner + 2 * c["n_groups"] * c["ssm_state_size"]
    yield from _linear(at + "in_proj", inner + conv + heads, c["hidden_size"], bias)
    yield at + "conv1d.weight", (conv, 1, c["conv_kernel"])
    if c["use_conv_bias"]:
        yield at + "conv1d.bias", (conv,)
    for vector in ("dt_bias", "A_log", "D"):
        yield at + vector, (heads,)
    yield at + "norm.weight", (inner,)
    yield from _linear(at + "out_proj", c["hidden_size"], inner, bias)


def _attention(c: dict[str, Any], at: str) -> Shapes:
    hidden, d_head = c["hidden_size"], c["head_dim"]
    queries, keys = c["num_attention_heads"] * d_head, c["num_key_value_heads"] * d_head
    for part, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield from _linear(at + f"{part}_proj", rows, hidden)
    yield from _linear(at + "o_proj", hidden, queries)


def _mlp(c: dict[str, Any], at: str, width: int = 0, biased: bool = True) -> Shapes:
    width, bias = width or c["intermediate_size"], biased and c["mlp_bias"]
    yield from _linear(at + "up_proj", width, c["hidden_size"], bias)
    yield from _linear(at + "down_proj", c["hidden_size"], width, bias)


def _experts(c: dict[str, Any], at: str) -> Shapes:
    hidden, width, latent = (
        c.get(key) for key in ("hidden_size", "moe_intermediate_size", "moe_latent_size")
    )
    yield at + "gate.weight", (c["n_routed_experts"], hidden)
    yield at + "gate.e_score_correction_bias", (c["n_routed_experts"],)
    for i in range(c["n_routed_experts"]):
        yield from _linear(at + f"experts.{i}.up_proj", width, latent or hidden)
        yield from _linear(at + f"experts.{i}.down_proj", latent or hidden, width)
    yield from _mlp(c, at + "shared_experts.", c["moe_shared_expert_intermediate_size"])
    if latent:
        yield from _linear(at + "fc1_latent_proj", latent, hidden, c["mlp_bias"])
        yield from _linear(at + "fc2_latent_proj", hidden, latent, c["mlp_bias"])


def in_memory(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers 5 keeps all experts of a layer in one tensor, and calls the trunk `model`."""
    named: dict[str, Any] = {}
    for name, value in tensors.items():
        name = name.replace("backbone.", "model.", 1)
        if match := re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.weight", name):
            named.setdefault(f"{match[1]}.{match[2]}", []).append(value)
        else:
            named[name] = value
    return {k: np.stack(v) if isinstance(v, list) else v for k, v in named.items()}


# fmt: off
FAMILIES = [
    Family(
        "nemotron_h", DEFAULTS, shapes,
        [
            ("nemotron-dense", 40, 61, pattern("M-M*-")),
            # The names of transformers 5, which leaves the number of layers out. All MLPs biased.
            ("nemotron-bias", 36, 53, {
                "layers_block_type": ["full_attention", "mlp", "linear_attention"],
                "num_hidden_layers": None, "num_key_value_heads": 4, "head_dim": 10,
                "conv_kernel": 3, "mamba_num_heads": 6, "n_groups": 3,
                "layer_norm_epsilon": 1e-4, "norm_eps": 1e-4,
                "use_bias": True, "mlp_bias": True, "use_conv_bias": False,
            }),
            ("nemotron-moe", 44, 67, pattern("ME*E", **EXPERTS)),
            # Experts in groups, on fewer numbers than the stream has, strengths as they are.
            ("nemotron-latent", 48, 59, pattern("MEM*E", **EXPERTS | {
                "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2,
                "moe_latent_size": 16, "norm_topk_prob": False, "routed_scaling_factor": 1.5,
            })),
            ("nemotron-mixed", 36, 59, pattern("M-*E", **EXPERTS | {
                "mlp_bias": True, "moe_latent_size": 12,
            })),
            ("nemotron-q8", 64, 97, pattern("ME*E", **EXPERTS | {
                "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
                "mamba_head_dim": 16, "mamba_num_heads": 4, "moe_intermediate_size": 64,
                "moe_shared_expert_intermediate_size": 96, "moe_latent_size": 32,
                # Far from each other, so that rounding seldom chooses another expert.
                "gain": {"gate.weight": 2, "e_score_correction_bias": 4},
                "routed_scaling_factor": 1.0,
            })),
        ],
        in_memory=in_memory,
        llamacpp=("nemotron-moe", "nemotron-latent", "nemotron-q8"),
        # With transformers 5 its converter takes every model for one with experts.
        misread=("nemotron-dense",),
        said=("nemotron-bias", "nemotron-mixed"),
    )
]
# fmt: on
