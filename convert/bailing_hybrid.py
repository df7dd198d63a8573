"""Hugging Face `bailing_hybrid` (Ling 3.0) to GGUF `bailingmoe3`."""

from __future__ import annotations

from ..kernels.errors import UnsupportedModel
from .checkpoint import Checkpoint
from .config import Config, demand
from .kda_hybrids import (
    AUTHORS_KEYS,
    Delta,
    add_layer,
    lower_bound,
    model_keys,
    positive_exp,
    remark_differences,
)
from .layers import add_ends
from .plan import Plan, negative_exp
from .rope import speed_keys

MODEL_TYPES = ("bailing_hybrid",)
SPELLINGS = AUTHORS_KEYS

#: Limits of the values within experts, one a layer; 0 and null are none.
_LIMITS = ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list")


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of `bailingmoe3`."""
    config = checkpoint.config
    config.one_of("score_function", "sigmoid", "sigmoid")
    config.one_of("gated_attention_proj_granularity_type", "head_wise", "head_wise")
    demand(config, {"no_kda_lora": True, "rope_interleave": True, "attention_bias": False})
    _refuse_limits(config)
    safe = config.flag("kda_safe_gate", True)
    heads = config.count("linear_num_heads", config.count("num_attention_heads"))
    # Saved by transformers 5, head_dim is the part of attention's heads that is turned.
    anew = config.get("linear_head_dim") is not None
    d_head = config.count("linear_head_dim" if anew else "head_dim")
    taps = config.count("short_conv_kernel_size", 4)
    rate = positive_exp if safe else negative_exp
    delta = Delta(heads, d_head, heads, d_head, taps, ("_proj",), rate, (heads, 1))
    keys = model_keys(checkpoint, delta)
    keys |= {
        # partial_rotary_factor says nothing here: qk_rope_head_dim does.
        **speed_keys(config, 6e6),
        "attention.value_length": d_head,
        "kda.safe_gate": safe,
        "kda.gate_lower_bound": lower_bound(config, "kda_lower_bound", -5.0),
        "expert_shared_feed_forward_length": keys["expert_feed_forward_length"]
        * keys["expert_shared_count"],
        "expert_weights_norm": config.flag("norm_topk_prob", True),
    }
    result = Plan("bailingmoe3", keys)
    if not safe:
        result.remark("for keelback only: decays have no lower bound (kda_safe_gate)")
    embedding = "model.word_embeddings.weight"
    if checkpoint.find(embedding) is None:
        embedding = "model.embed_tokens.weight"
    add_ends(result, checkpoint, embedding, "model.norm.weight")
    for i in range(keys["block_count"]):
        add_layer(result, checkpoint, i, delta, gated=True)
    remark_differences(result)
    return result


def _refuse_limits(config: Config) -> None:
    for key in _LIMITS:
        limits = config.get(key, [])
        if not isinstance(limits, list) or any(limits):
            raise UnsupportedModel(
                f"{config.path}: {key} limits values within experts; keelback runs models without"
            )
    rope = config.get("rope_parameters", {})
    if config.get("mrope_section") or (isinstance(rope, dict) and rope.get("mrope_section")):
        raise UnsupportedModel(
            f"{config.path}: mrope_section gives positions several dimensions, which keelback "
            "does not run in this architecture"
        )
