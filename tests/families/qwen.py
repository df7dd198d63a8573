"""Tiny checkpoints of Qwen3-Next and Qwen3.5, with experts and without."""

import re
from typing import Any

import numpy as np

from tiny import Family
from tiny_shapes import Shapes

_COMMON: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "attention_bias": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "partial_rotary_factor": 0.5,
    },
    "tie_word_embeddings": False,
}
_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
_NEXT = _COMMON | _EXPERTS | {"architectures": ["Qwen3NextForCausalLM"], "intermediate_size": 76}
_DENSE = _COMMON | {"architectures": ["Qwen3_5ForCausalLM"], "intermediate_size": 76}
_MOE = _COMMON | _EXPERTS | {"architectures": ["Qwen3_5MoeForCausalLM"]}


def _sections(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary positions of Qwen3.5, as its checkpoints have them."""
    rope = {"mrope_interleaved": True, "mrope_section": list(sections), "rope_type": "default"}
    return rope | {"partial_rotary_factor": 0.25, "rope_theta": 10000.0} | more


def _attends(c: dict[str, Any], i: int) -> bool:
    if types := c.get("layer_types"):
        return types[i] == "full_attention"
    return (i + 1) % c.get("full_attention_interval", 4) == 0


def _attention(c: dict[str, Any], at: str) -> Shapes:
    hidden, d_head, heads = c["hidden_size"], c["head_dim"], c["num_attention_heads"]
    keys = c["num_key_value_heads"] * d_head
    projections = {
        "q": (2 * heads * d_head, hidden), "k": (keys, hidden), "v": (keys, hidden),
        "o": (hidden, heads * d_head),
    }  # fmt: skip
    for part, shape in projections.items():
        yield f"{at}{part}_proj.weight", shape
        if c["attention_bias"]:
            yield f"{at}{part}_proj.bias", shape[:1]
    for part in "qk":
        yield f"{at}{part}_norm.weight", (d_head,)


def _delta(c: dict[str, Any], at: str, fused: bool) -> Shapes:
    hidden, heads, d_value = (
        c[key] for key in ("hidden_size", "linear_num_value_heads", "linear_value_head_dim")
    )
    keys, values = c["linear_num_key_heads"] * c["linear_key_head_dim"], heads * d_value
    if fused:
        yield at + "in_proj_qkvz.weight", (2 * keys + 2 * values, hidden)
        yield at + "in_proj_ba.weight", (2 * heads, hidden)
    else:
        yield at + "in_proj_qkv.weight", (2 * keys + values, hidden)
        yield at + "in_proj_z.weight", (values, hidden)
        yield at + "in_proj_a.weight", (heads, hidden)
        yield at + "in_proj_b.weight", (heads, hidden)
    yield at + "conv1d.weight", (2 * keys + values, 1, c["linear_conv_kernel_dim"])
    yield at + "A_log", (heads,)
    yield at + "dt_bias", (heads,)
    yield at + "norm.weight", (d_value,)
    yield at + "out_proj.weight", (hidden, values)


def _mlp(c: dict[str, Any], at: str, width: int) -> Shapes:
    hidden = c["hidden_size"]
    yield at + "gate_proj.weight", (width, hidden)
    yield at + "up_proj.weight", (width, hidden)
    yield at + "down_proj.weight", (hidden, width)


def _experts(c: dict[str, Any], at: str, fused: bool) -> Shapes:
    hidden, count, width = c["hidden_size"], c["num_experts"], c["moe_intermediate_size"]
    yield at + "gate.weight", (count, hidden)
    yield at + "shared_expert_gate.weight", (1, hidden)
    yield from _mlp(c, at + "shared_expert.", c["shared_expert_intermediate_size"])
    if fused:
        yield at + "experts.gate_up_proj", (count, 2 * width, hidden)
        yield at + "experts.down_proj", (count, hidden, width)
        return
    for expert in range(count):
        yield from _mlp(c, f"{at}experts.{expert}.", width)


def _shapes(c: dict[str, Any]) -> Shapes:
    """Qwen3-Next has fused projections and single experts on disk, Qwen3.5 the other way round."""
    hidden, following = c["hidden_size"], c["model_type"] == "qwen3_next"
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        if _attends(c, i):
            yield from _attention(c, at + "self_attn.")
        else:
            yield from _delta(c, at + "linear_attn.", following)
        yield at + "post_attention_layernorm.weight", (hidden,)
        if "num_experts" in c:
            yield from _experts(c, at + "mlp.", not following)
        else:
            yield from _mlp(c, at + "mlp.", c["intermediate_size"])
    yield "model.norm.weight", (hidden,)


def _stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers 5 keeps all experts of a layer together, the rows of gates above those of up."""
    memory, experts = {}, {}
    for name, values in tensors.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name):
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = values
        else:
            memory[name] = values
    for prefix, parts in experts.items():
        count = len(parts) // 3
        both = [np.concatenate([parts[e, "gate"], parts[e, "up"]]) for e in range(count)]
        memory[f"{prefix}.gate_up_proj"] = np.stack(both)
        memory[f"{prefix}.down_proj"] = np.stack([parts[e, "down"] for e in range(count)])
    return memory


#: All norms but the one behind the recurrence hold their weights less one.
_INTERVALS = ((("linear_attn.norm.weight",), 0.5, 1.5), (("norm.weight",), -0.5, 0.5))
_ROUTER = {"gain": {"mlp.gate": 3, "shared_expert_gate": 3}}
_LINEAR, _FULL = "linear_attention", "full_attention"

# fmt: off
FAMILIES = [
    Family(
        "qwen3_next", _NEXT, _shapes, [
            ("next-moe", 40, 61, {"num_hidden_layers": 4, **_ROUTER}),
            ("next-tied", 36, 67, {
                "num_hidden_layers": 3, "layer_types": [_LINEAR, _FULL, _LINEAR],
                "linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_key_head_dim": 12,
                "linear_value_head_dim": 12, "linear_conv_kernel_dim": 3, "rms_norm_eps": 1e-5,
                "num_experts": 4, "num_experts_per_tok": 1, "head_dim": 10,
                "num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True,
                "rope_parameters": {"rope_theta": 300.0, "rope_type": "default"},
                "partial_rotary_factor": 0.8, "gain": {"linear_attn.conv1d": 0.05},
            }),
            ("next-q8", 64, 97, {
                "full_attention_interval": 2, "layer_types": [_LINEAR, _FULL], "head_dim": 32,
                "linear_num_value_heads": 6, "linear_key_head_dim": 32,
                "linear_value_head_dim": 32, "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 64, **_ROUTER,
            }),
        ],
        # Not next-tied: llama.cpp takes rms_norm_eps, 1e-5, for the L2 norm of queries and keys.
        in_memory=_stacked, intervals=_INTERVALS, llamacpp=("next-moe", "next-q8"),
    ),
    Family(
        "qwen3_5_text", _DENSE, _shapes, [
            ("qwen35-dense", 40, 61, {
                "num_hidden_layers": 4, "full_attention_interval": 2,
                "layer_types": [_LINEAR, _FULL, _LINEAR, _FULL], "head_dim": 64,
                "num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_value_heads": 6,
                "rope_parameters": _sections(3, 3, 2), "tie_word_embeddings": True,
            }),
            ("qwen35-yarn", 36, 67, {
                "num_hidden_layers": 3, "layer_types": [_FULL, _LINEAR, _FULL], "head_dim": 32,
                "linear_num_value_heads": 2, "linear_conv_kernel_dim": 3,
                "max_position_embeddings": 256, "rope_parameters": _sections(
                    3, 3, 2, rope_type="yarn", factor=4.0, rope_theta=100.0,
                    original_max_position_embeddings=64, partial_rotary_factor=0.5,
                ),
            }),
            ("qwen35-bias", 44, 59, {
                "num_hidden_layers": 2, "layer_types": [_LINEAR, _FULL], "attention_bias": True,
                "linear_key_head_dim": 12, "linear_value_head_dim": 20,
                "linear_num_value_heads": 8,
            }),
            ("qwen35-q8", 64, 97, {
                "layer_types": [_LINEAR, _FULL], "head_dim": 64, "num_attention_heads": 2,
                "num_key_value_heads": 1, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
                "linear_num_value_heads": 4, "intermediate_size": 160, "dtype": "bfloat16",
                "rope_parameters": _sections(3, 3, 2, rope_theta=1e7),
            }),
        ],
        intervals=_INTERVALS, llamacpp=("qwen35-dense", "qwen35-yarn", "qwen35-q8"),
        said=("qwen35-bias",),
    ),
    Family(
        "qwen3_5_moe_text", _MOE, _shapes, [
            ("qwen35moe-fused", 40, 61, {
                "num_hidden_layers": 3, "layer_types": [_LINEAR, _LINEAR, _FULL], "head_dim": 32,
                "rope_parameters": _sections(2, 1, 1), **_ROUTER,
            }),
            ("qwen35moe-q8", 64, 97, {
                "layer_types": [_FULL, _LINEAR], "head_dim": 64, "num_attention_heads": 2,
                "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
                "linear_value_head_dim": 32, "linear_num_value_heads": 2,
                # Rounding then changes the choice of weak experts only.
                "num_experts": 8, "num_experts_per_tok": 5, "moe_intermediate_size": 64,
                "shared_expert_intermediate_size": 32, "tie_word_embeddings": True,
                "rope_parameters": _sections(3, 3, 2), **_ROUTER,
            }),
        ],
        intervals=_INTERVALS, llamacpp=("qwen35moe-fused", "qwen35moe-q8"),
    ),
]
# fmt: on
