"""Hugging Face `mamba2` to GGUF `mamba2`."""

from __future__ import annotations

import math

from .checkpoint import Checkpoint
from .config import Config
from .layers import CONTEXT_LENGTH, add_conv, add_ends, add_projection_biases, remark_inner_size
from .mamba_ssm import FLA_KEYS, add_layer, layer_keys
from .plan import Part, Plan, negative_exp

MODEL_TYPES = ("mamba2",)
SPELLINGS = FLA_KEYS
CLASSES = {"Mamba2ForCausalLM": "mamba2"}


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of `mamba2`."""
    config = checkpoint.config
    config.one_of("hidden_act", "silu", "silu", "swish")
    d_model, layers = config.count("hidden_size"), config.count("num_hidden_layers")
    heads, groups = config.multiple("num_heads", "n_groups", 128, 8)
    d_inner = heads * config.count("head_dim", 64)
    keys = {
        "context_length": CONTEXT_LENGTH, "embedding_length": d_model, "block_count": layers,
        **layer_keys(config),
        "attention.layer_norm_rms_epsilon": config.number("layer_norm_epsilon", 1e-5),
        "ssm.conv_kernel": config.count("conv_kernel", 4), "ssm.inner_size": d_inner,
        "ssm.state_size": config.count("state_size", 128), "ssm.time_step_rank": heads,
        "ssm.group_count": groups,
    }  # fmt: skip
    result = Plan("mamba2", keys)
    remark_inner_size(result)
    remark_limit(result, config)
    add_ends(result, checkpoint, "model.embeddings.weight", "model.norm_f.weight")
    for i in range(layers):
        add_layer(result, checkpoint, i, add_mixer)
    return result


def remark_limit(result: Plan, config: Config) -> None:
    """Time steps that are limited: transformers and mamba_ssm do so in prompts, and only there."""
    limit = config.get("time_step_limit")
    if limit is not None and limit != [0.0, math.inf]:
        result.remark(
            f"{config.name('time_step_limit')} is {str(limit)[:40]}, which is left out: keelback "
            "and llama.cpp limit no time steps"
        )


def add_mixer(
    result: Plan, checkpoint: Checkpoint, mixer: str, blk: str, normed: bool = True
) -> None:
    """The tensors of a Mamba-2 mixer, whose names begin with `mixer` in the checkpoint.

    normed: whether there is a norm behind the recurrence.
    """
    keys, need = result.keys, checkpoint.require
    d_model, d_inner = keys["embedding_length"], keys["ssm.inner_size"]
    heads, groups = keys["ssm.time_step_rank"], keys["ssm.group_count"]
    channels = d_inner + 2 * groups * keys["ssm.state_size"]
    projected = d_inner + channels + heads
    in_proj = need(f"{mixer}.in_proj.weight", projected, d_model)
    result.add(f"{blk}.ssm_in.weight", (projected, d_model), in_proj)
    add_conv(result, checkpoint, mixer, blk, channels)
    result.add(f"{blk}.ssm_dt.bias", (heads,), need(f"{mixer}.dt_bias", heads))
    a_log = Part(need(f"{mixer}.A_log", heads), function=negative_exp)
    result.add(f"{blk}.ssm_a", (heads, 1), a_log)
    result.add(f"{blk}.ssm_d", (heads, 1), need(f"{mixer}.D", heads))
    if normed:
        gated_norm = need(f"{mixer}.norm.weight", d_inner)
        result.add(f"{blk}.ssm_norm.weight", (groups, d_inner // groups), gated_norm)
    out_proj = need(f"{mixer}.out_proj.weight", d_model, d_inner)
    result.add(f"{blk}.ssm_out.weight", (d_model, d_inner), out_proj)
    add_projection_biases(result, checkpoint, mixer, blk, projected)
