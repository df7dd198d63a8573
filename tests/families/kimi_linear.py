"""Tiny checkpoints of `kimi_linear`, with its authors' names, which transformers saves too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tiny import Family

Shapes = Iterator[tuple[str, tuple[int, ...]]]

#: As in the authors' config.json.
_DEFAULTS = {
    "architectures": ["KimiLinearForCausalLM"],
    "num_hidden_layers": 4,
    "linear_attn_config": {
        "head_dim": 12, "num_heads": 3, "short_conv_kernel_size": 4,
        "kda_layers": [1, 2, 4], "full_attn_layers": [3],
    },
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 13,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "mla_use_nope": True,
    "intermediate_size": 44,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 12,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_experts": 6,
    "num_experts_per_token": 3,
    "num_expert_group": 1,
    "topk_group": 1,
    "use_grouped_topk": True,
    "num_shared_experts": 1,
    "routed_scaling_factor": 2.446,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "model_max_length": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    # llama.cpp takes the model's epsilon in norms where transformers has 1e-6.
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip
#: As transformers 5 says it; a third of the layers' heads are of another number.
_SAVED_ANEW = {
    "linear_attn_config": {},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_hidden_layers": 3,
    "linear_num_heads": 2,
    "linear_head_dim": 20,
    "linear_conv_kernel_dim": 3,
    "q_lora_rank": 20,
    "moe_renormalize": False,
    "rms_norm_eps": 1e-5,
}


def shapes(c: dict[str, Any]) -> Shapes:
    hidden, mixers = c["hidden_size"], _mixers(c)
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i, mixer in enumerate(mixers):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        yield from ((f"{at}self_attn.{name}", shape) for name, shape in mixer(c))
        yield at + "post_attention_layernorm.weight", (hidden,)
        if i < c["first_k_dense_replace"]:
            yield from _mlp(f"{at}mlp", hidden, c["intermediate_size"])
            continue
        experts, width = c["num_experts"], c["moe_intermediate_size"]
        yield at + "block_sparse_moe.gate.weight", (experts, hidden)
        yield at + "block_sparse_moe.gate.e_score_correction_bias", (experts,)
        for e in range(experts):
            yield at + f"block_sparse_moe.experts.{e}.w1.weight", (width, hidden)
            yield at + f"block_sparse_moe.experts.{e}.w2.weight", (hidden, width)
            yield at + f"block_sparse_moe.experts.{e}.w3.weight", (width, hidden)
        shared = width * c["num_shared_experts"]
        yield from _mlp(f"{at}block_sparse_moe.shared_experts", hidden, shared)
    yield "model.norm.weight", (hidden,)


def _mlp(at: str, hidden: int, width: int) -> Shapes:
    yield f"{at}.gate_proj.weight", (width, hidden)
    yield f"{at}.up_proj.weight", (width, hidden)
    yield f"{at}.down_proj.weight", (hidden, width)


def _mixers(c: dict[str, Any]) -> list[Any]:
    if "layer_types" in c:
        return [_attention if kind == "full_attention" else _delta for kind in c["layer_types"]]
    full = c["linear_attn_config"]["full_attn_layers"]
    return [_attention if i + 1 in full else _delta for i in range(c["num_hidden_layers"])]


def _attention(c: dict[str, Any]) -> Shapes:
    hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    plain, turned, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    if rank := c["q_lora_rank"]:
        yield "q_a_proj.weight", (rank, hidden)
        yield "q_a_layernorm.weight", (rank,)
        yield "q_b_proj.weight", (heads * (plain + turned), rank)
    else:
        yield "q_proj.weight", (heads * (plain + turned), hidden)
    yield "kv_a_proj_with_mqa.weight", (latent + turned, hidden)
    yield "kv_a_layernorm.weight", (latent,)
    yield "kv_b_proj.weight", (heads * (plain + value), latent)
    yield "o_proj.weight", (hidden, heads * value)


def _delta(c: dict[str, Any]) -> Shapes:
    inner = c["linear_attn_config"]
    heads = inner.get("num_heads", c.get("linear_num_heads"))
    d_head = inner.get("head_dim", c.get("linear_head_dim"))
    taps = inner.get("short_conv_kernel_size", c.get("linear_conv_kernel_dim"))
    hidden, width = c["hidden_size"], heads * d_head
    for part in "qkv":
        yield f"{part}_proj.weight", (width, hidden)
        yield f"{part}_conv1d.weight", (width, 1, taps)
    for gate in "fg":
        yield f"{gate}_a_proj.weight", (d_head, hidden)
        yield f"{gate}_b_proj.weight", (width, d_head)
    yield "b_proj.weight", (heads, hidden)
    yield "A_log", (1, 1, heads, 1)
    yield "dt_bias", (width,)
    yield "o_norm.weight", (d_head,)
    yield "o_proj.weight", (hidden, width)


def in_memory(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers joins the three convolutions and the experts of a layer."""
    memory: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        at, _, rest = name.rpartition("self_attn.")
        if rest.startswith(("f_a_proj", "f_b_proj", "A_log", "dt_bias")):
            memory[f"{at}self_attn.forget_gate.{rest}"] = values
        elif rest == "q_conv1d.weight":
            parts = [tensors[f"{at}self_attn.{part}_conv1d.weight"] for part in "qkv"]
            memory[f"{at}self_attn.conv1d.weight"] = np.concatenate(parts)
        elif ".experts.0.w" in name:
            moe = name.partition(".experts.")[0]
            first, stack = moe.replace("block_sparse_moe", "mlp") + ".experts.", _stack
            if name.endswith("w1.weight"):
                both = [stack(tensors, moe, part) for part in ("w1", "w3")]
                memory[first + "gate_up_proj"] = np.concatenate(both, axis=1)
                memory[first + "down_proj"] = stack(tensors, moe, "w2")
        elif "_conv1d" not in name and ".experts." not in name:
            memory[name.replace("block_sparse_moe", "mlp")] = values
    return memory


def _stack(tensors: dict[str, np.ndarray], moe: str, part: str) -> np.ndarray:
    count = sum(name.startswith(f"{moe}.experts.") for name in tensors) // 3
    return np.stack([tensors[f"{moe}.experts.{e}.{part}.weight"] for e in range(count)])


# fmt: off
FAMILIES = [
    Family(
        "kimi_linear", _DEFAULTS, shapes,
        [
            ("kimi-hub", 40, 61, {}),
            ("kimi-groups", 36, 67, {
                "linear_attn_config": {
                    "head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 3,
                    "kda_layers": [2, 3], "full_attn_layers": [1, 4],
                },
                "num_attention_heads": 4, "num_key_value_heads": 4, "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 10, "first_k_dense_replace": 2, "num_experts": 8,
                "num_experts_per_token": 2, "num_expert_group": 4, "n_group": 4, "topk_group": 2,
                "num_shared_experts": 2, "routed_scaling_factor": 0.7,
            }),
            # Short queries, keys and latent rows make the 1e-6 inside their norms visible.
            ("kimi-saved", 44, 59, _SAVED_ANEW | {
                "gain": {"q_conv1d": 0.03, "k_conv1d": 0.03, "kv_a_proj": 0.02, "q_a_proj": 0.02},
            }),
            ("kimi-q8", 96, 97, {
                "linear_attn_config": {
                    "head_dim": 32, "num_heads": 2, "short_conv_kernel_size": 4,
                    "kda_layers": [1, 3], "full_attn_layers": [2],
                },
                "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
                "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
                "v_head_dim": 32, "intermediate_size": 160, "moe_intermediate_size": 64,
                # Rounding then seldom changes the choice of experts.
                "gain": {"correction_bias": 4},
            }),
        ],
        in_memory,
        llamacpp=("kimi-hub", "kimi-groups", "kimi-q8"),
        said=("kimi-saved",),
        as_written=True,
    )
]
# fmt: on
