"""LFM2, dense and with experts: tiny checkpoints as the hub has them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiny import Family
from tiny_shapes import Shapes

_DEFAULTS: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "conv_L_cache": 3,
    "conv_bias": False,
    "block_auto_adjust_ff_dim": False,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 16,
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MIXED = _DEFAULTS | {
    "architectures": ["Lfm2MoeForCausalLM"],
    "num_dense_layers": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "use_expert_bias": True,
}
for _key in ("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of"):
    del _MIXED[_key]


def _shapes(c: dict[str, Any]) -> Shapes:
    hidden = c["hidden_size"]
    chosen = c.get("full_attn_idxs", [])
    types = c.get("layer_types") or [i in chosen for i in range(c["num_hidden_layers"])]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i, kind in enumerate(types):
        at = f"model.layers.{i}."
        for norm in ("operator_norm", "ffn_norm"):
            yield at + f"{norm}.weight", (hidden,)
        yield from _mixer_shapes(c, at, kind in (True, "full_attention"))
        yield from _feed_forward_shapes(c, at + "feed_forward.", i)
    yield "model.embedding_norm.weight", (hidden,)


def _mixer_shapes(c: dict[str, Any], at: str, attends: bool) -> Shapes:
    hidden, d_head = (
        c["hidden_size"],
        c.get("head_dim", c["hidden_size"] // c["num_attention_heads"]),
    )
    if attends:
        inner, shared = d_head * c["num_attention_heads"], d_head * c["num_key_value_heads"]
        for part, rows in (("q", inner), ("k", shared), ("v", shared)):
            yield at + f"self_attn.{part}_proj.weight", (rows, hidden)
        yield at + "self_attn.out_proj.weight", (hidden, inner)
        for part in "qk":
            yield at + f"self_attn.{part}_layernorm.weight", (d_head,)
        return
    parts = (("in_proj", 3 * hidden, hidden), ("out_proj", hidden, hidden))
    for part, *shape in (*parts, ("conv", hidden, 1, c["conv_L_cache"])):
        yield at + f"conv.{part}.weight", tuple(shape)
        if c["conv_bias"]:
            yield at + f"conv.{part}.bias", (shape[0],)


def _feed_forward_shapes(c: dict[str, Any], at: str, i: int) -> Shapes:
    hidden, width = c["hidden_size"], c.get("block_ff_dim", c["intermediate_size"])
    prefixes = [at]
    if "num_experts" in c and i >= c["num_dense_layers"]:
        yield at + "gate.weight", (c["num_experts"], hidden)
        if c["use_expert_bias"]:
            yield at + "expert_bias", (c["num_experts"],)
        width = c["moe_intermediate_size"]
        prefixes = [f"{at}experts.{e}." for e in range(c["num_experts"])]
    elif c.get("block_auto_adjust_ff_dim"):
        width = int(c["block_ffn_dim_multiplier"] * int(2 * width / 3))
        width = -(-width // c["block_multiple_of"]) * c["block_multiple_of"]
    for prefix in prefixes:
        for part, *shape in (("w1", width, hidden), ("w2", hidden, width), ("w3", width, hidden)):
            yield prefix + f"{part}.weight", tuple(shape)


def in_memory(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers 5 stacks experts, the rows of the gate above those of up."""
    kept = {name: values for name, values in tensors.items() if ".experts." not in name}
    count = len({name.split(".")[5] for name in tensors.keys() - kept.keys()})
    for name in tensors:
        if name.endswith("experts.0.w1.weight"):
            at = name.removesuffix("0.w1.weight")
            every = {
                part: np.stack([tensors[f"{at}{e}.{part}.weight"] for e in range(count)])
                for part in ("w1", "w2", "w3")
            }
            kept[at + "gate_up_proj"] = np.concatenate([every["w1"], every["w3"]], axis=1)
            kept[at + "down_proj"] = every["w2"]
    return kept


# fmt: off
FAMILIES = [
    Family("lfm2", _DEFAULTS, _shapes, [
        ("lfm2-dense", 40, 61, {"num_attention_heads": 5, "num_key_value_heads": 1,
         "intermediate_size": 52}),
        ("lfm2-adjusted", 48, 67, {"num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 90, "block_auto_adjust_ff_dim": True,
         "block_ffn_dim_multiplier": 1.3, "conv_L_cache": 4, "norm_eps": 1e-4,
         "rope_theta": 500.0, "tie_word_embeddings": False, "num_hidden_layers": 4,
         "layer_types": None, "full_attn_idxs": [0, 3]}),
        ("lfm2-bias", 36, 59, {"num_attention_heads": 3, "num_key_value_heads": 3,
         "intermediate_size": 44, "conv_bias": True}),
        ("lfm2-q8", 96, 97, {"num_attention_heads": 6, "num_key_value_heads": 2,
         "intermediate_size": 160}),
    ], llamacpp=("lfm2-dense", "lfm2-q8"), said=("lfm2-bias",)),
    Family("lfm2_moe", _MIXED, _shapes, [
        ("lfm2moe-bias", 40, 61, {"num_attention_heads": 5, "num_key_value_heads": 1,
         "intermediate_size": 52, "num_experts": 8, "num_experts_per_tok": 3,
         "moe_intermediate_size": 20, "num_hidden_layers": 4,
         "layer_types": ["conv", "full_attention", "conv", "full_attention"],
         "gain": {"feed_forward.gate.": 3}}),
        ("lfm2moe-plain", 48, 67, {"num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "intermediate_size": 52, "num_experts": 6, "num_experts_per_tok": 2,
         "moe_intermediate_size": 28, "num_dense_layers": 0, "use_expert_bias": False,
         "norm_topk_prob": False, "routed_scaling_factor": 1.7, "conv_L_cache": 4,
         "norm_eps": 1e-4, "tie_word_embeddings": False}),
        ("lfm2moe-q8", 96, 97, {"num_attention_heads": 6, "num_key_value_heads": 2,
         "intermediate_size": 160, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 64, "gain": {"feed_forward.gate.": 3}}),
    ], in_memory=in_memory, llamacpp=("lfm2moe-bias", "lfm2moe-q8"), said=("lfm2moe-plain",)),
]
# fmt: on
