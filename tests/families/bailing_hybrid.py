"""Tiny checkpoints of `bailing_hybrid`, Ling 3.0, which transformers saves as its authors do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tiny import Family

Shapes = Iterator[tuple[str, tuple[int, ...]]]

_DEFAULTS = {
    # The class by which llama.cpp's converter knows the model.
    "architectures": ["BailingMoeV3ForCausalLM"],
    "num_hidden_layers": 4,
    "layer_group_size": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 12,
    "short_conv_kernel_size": 4,
    "no_kda_lora": True,
    "kda_safe_gate": True,
    "kda_lower_bound": -5.0,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "gated_attention_proj_granularity_type": "head_wise",
    "rope_theta": 300.0,
    "rope_interleave": True,
    "partial_rotary_factor": 0.5,
    "intermediate_size": 44,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 12,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "num_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


def shapes(c: dict[str, Any]) -> Shapes:
    hidden, group = c["hidden_size"], c["layer_group_size"]
    yield "model.word_embeddings.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        mixer = _delta if (i + 1) % group else _attention
        yield from ((f"{at}attention.{name}", shape) for name, shape in mixer(c))
        yield at + "post_attention_layernorm.weight", (hidden,)
        if i < c["first_k_dense_replace"]:
            yield from _mlp(f"{at}mlp", hidden, c["intermediate_size"])
            continue
        experts, width = c["num_experts"], c["moe_intermediate_size"]
        yield at + "mlp.gate.weight", (experts, hidden)
        yield at + "mlp.gate.expert_bias", (experts,)
        for e in range(experts):
            yield from _mlp(f"{at}mlp.experts.{e}", hidden, width)
        yield from _mlp(f"{at}mlp.shared_experts", hidden, width * c["num_shared_experts"])
    yield "model.norm.weight", (hidden,)


def _mlp(at: str, hidden: int, width: int) -> Shapes:
    yield f"{at}.gate_proj.weight", (width, hidden)
    yield f"{at}.up_proj.weight", (width, hidden)
    yield f"{at}.down_proj.weight", (hidden, width)


def _attention(c: dict[str, Any]) -> Shapes:
    hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    plain, turned, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    yield "q_proj.weight", (heads * (plain + turned), hidden)
    yield "kv_a_proj_with_mqa.weight", (latent + turned, hidden)
    yield "kv_a_layernorm.weight", (latent,)
    yield "kv_b_proj.weight", (heads * (plain + value), latent)
    yield "g_proj.weight", (heads, hidden)
    yield "dense.weight", (hidden, heads * value)


def _delta(c: dict[str, Any]) -> Shapes:
    hidden, heads, d_head = c["hidden_size"], c["num_attention_heads"], c["head_dim"]
    width = heads * d_head
    for part in "qkv":
        yield f"{part}_proj.weight", (width, hidden)
        yield f"{part}_conv1d.weight", (width, 1, c["short_conv_kernel_size"])
    yield "f_proj.weight", (width, hidden)
    yield "g_proj.weight", (width, hidden)
    yield "b_proj.weight", (heads, hidden)
    yield "A_log", (heads,)
    yield "dt_bias", (width,)
    yield "o_norm.weight", (d_head,)
    yield "dense.weight", (hidden, width)


_RENAMED = (
    ("word_embeddings", "embed_tokens"), (".attention.", ".self_attn."), (".dense.", ".o_proj."),
    (".expert_bias", ".e_score_correction_bias"), ("attn.f_proj", "attn.forget_gate.f_proj"),
    ("attn.A_log", "attn.forget_gate.A_log"), ("attn.dt_bias", "attn.forget_gate.dt_bias"),
)  # fmt: skip


def in_memory(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers has other names, and joins the three convolutions and the experts of a layer."""
    memory: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        renamed = name
        for theirs, ours in _RENAMED:
            renamed = renamed.replace(theirs, ours)
        if name.endswith("q_conv1d.weight"):
            parts = [tensors[name.replace("q_conv1d", f"{part}_conv1d")] for part in "qkv"]
            memory[renamed.replace("q_conv1d", "conv1d")] = np.concatenate(parts)
        elif name.endswith(".experts.0.gate_proj.weight"):
            moe = name.removesuffix("0.gate_proj.weight")
            both = [_stack(tensors, moe, f"{part}_proj") for part in ("gate", "up")]
            memory[f"{moe}gate_up_proj"] = np.concatenate(both, axis=1)
            memory[f"{moe}down_proj"] = _stack(tensors, moe, "down_proj")
        elif "_conv1d" not in name and ".experts." not in name:
            memory[renamed] = values
    return memory


def _stack(tensors: dict[str, np.ndarray], moe: str, part: str) -> np.ndarray:
    count = sum(name.startswith(moe) for name in tensors) // 3
    return np.stack([tensors[f"{moe}{e}.{part}.weight"] for e in range(count)])


# fmt: off
FAMILIES = [
    Family(
        "bailing_hybrid", _DEFAULTS, shapes,
        [
            ("ling-hub", 40, 61, {}),
            # The last layers make no whole group: transformers has them as delta attention.
            ("ling-unbounded", 36, 67, {
                "num_hidden_layers": 5, "layer_group_size": 3, "head_dim": 8,
                "num_attention_heads": 4, "num_key_value_heads": 4, "short_conv_kernel_size": 3,
                "kda_safe_gate": False, "first_k_dense_replace": 2, "norm_topk_prob": False,
                "num_experts": 6, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                "num_shared_experts": 2, "routed_scaling_factor": 0.8, "rms_norm_eps": 1e-5,
                "partial_rotary_factor": 1.0, "rope_parameters": {
                    "rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
                "gain": {"q_conv1d": 0.03, "k_conv1d": 0.03, "kv_a_proj": 0.02},
            }),
            ("ling-q8", 96, 97, {
                "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
                "head_dim": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 32, "v_head_dim": 32, "first_k_dense_replace": 0,
                "intermediate_size": 160, "moe_intermediate_size": 64, "kda_lower_bound": -2.5,
                "num_shared_experts": 2, "moe_shared_expert_intermediate_size": 128,
                # Rounding then seldom changes the choice of experts.
                "layer_group_size": 3, "gain": {"expert_bias": 4},
            }),
        ],
        in_memory,
        llamacpp=("ling-hub", "ling-q8"),
        as_written=True,
    )
]
# fmt: on
