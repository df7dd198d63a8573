"""Hugging Face `mamba2` to GGUF `mamba2`."""

from __future__ import annotations

from ..kernels.errors import InvalidFile
from .checkpoint import Checkpoint
from .mamba import CONTEXT_LENGTH, add_conv, add_head, add_projection_biases
from .plan import Plan, negative_exp

MODEL_TYPES = ("mamba2",)


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of `mamba2`."""
    config = checkpoint.config
    config.one_of("hidden_act", "silu", "silu", "swish")
    d_model, layers = config.count("hidden_size"), config.count("num_hidden_layers")
    heads, head_dim = config.count("num_heads", 128), config.count("head_dim", 64)
    groups, d_state = config.count("n_groups", 8), config.count("state_size", 128)
    taps, d_inner = config.count("conv_kernel", 4), heads * head_dim
    if heads % groups:
        raise InvalidFile(f"{config.path}: num_heads {heads} is no multiple of n_groups {groups}")
    channels = d_inner + 2 * groups * d_state
    embedding = checkpoint.require("backbone.embeddings.weight", "backbone.embedding.weight")
    vocabulary = embedding.shape[0]

    keys = {
        "context_length": CONTEXT_LENGTH, "embedding_length": d_model, "block_count": layers,
        "vocab_size": vocabulary, "feed_forward_length": 0, "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": config.number("layer_norm_epsilon", 1e-5),
        "ssm.conv_kernel": taps, "ssm.inner_size": d_inner, "ssm.state_size": d_state,
        "ssm.time_step_rank": heads, "ssm.group_count": groups,
    }  # fmt: skip
    result = Plan("mamba2", keys)
    result.add("token_embd.weight", (vocabulary, d_model), embedding)
    result.add("output_norm.weight", (d_model,), checkpoint.require("backbone.norm_f.weight"))
    add_head(result, checkpoint, vocabulary, d_model)
    for i in range(layers):
        layer, blk = f"backbone.layers.{i}", f"blk.{i}"
        mixer = f"{layer}.mixer"
        result.add(
            f"{blk}.attn_norm.weight", (d_model,), checkpoint.require(f"{layer}.norm.weight")
        )
        in_proj = checkpoint.require(f"{mixer}.in_proj.weight")
        result.add(f"{blk}.ssm_in.weight", (d_inner + channels + heads, d_model), in_proj)
        add_conv(result, checkpoint, mixer, blk, channels, taps)
        result.add(f"{blk}.ssm_dt.bias", (heads,), checkpoint.require(f"{mixer}.dt_bias"))
        result.add(
            f"{blk}.ssm_a", (heads, 1), checkpoint.require(f"{mixer}.A_log"), transform=negative_exp
        )
        result.add(f"{blk}.ssm_d", (heads, 1), checkpoint.require(f"{mixer}.D"))
        norm = checkpoint.require(f"{mixer}.norm.weight")
        result.add(f"{blk}.ssm_norm.weight", (groups, d_inner // groups), norm)
        result.add(
            f"{blk}.ssm_out.weight",
            (d_model, d_inner),
            checkpoint.require(f"{mixer}.out_proj.weight"),
        )
        add_projection_biases(result, checkpoint, mixer, blk, d_inner + channels + heads, d_model)
    return result
