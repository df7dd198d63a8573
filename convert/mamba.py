"""Hugging Face `mamba` and `falcon_mamba` to GGUF `mamba`."""

from __future__ import annotations

import math

import numpy as np

from .checkpoint import Checkpoint
from .plan import Plan, negative_exp

MODEL_TYPES = ("mamba", "falcon_mamba")

#: Mamba has no context limit; llama.cpp writes this one.
CONTEXT_LENGTH = 1 << 20


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of `mamba`."""
    config = checkpoint.config
    config.one_of("hidden_act", "silu", "silu", "swish")
    d_model, layers = config.count("hidden_size"), config.count("num_hidden_layers")
    d_inner = config.count("intermediate_size", config.count("expand", 2) * d_model)
    d_state, taps = config.count("state_size", 16), config.count("conv_kernel", 4)
    rank = config.get("time_step_rank", "auto")
    rank = math.ceil(d_model / 16) if rank == "auto" else config.count("time_step_rank")
    falcon = config.get("model_type") == "falcon_mamba"
    embedding = checkpoint.require("backbone.embeddings.weight", "backbone.embedding.weight")
    vocabulary = embedding.shape[0]

    keys = {
        "context_length": CONTEXT_LENGTH, "embedding_length": d_model, "block_count": layers,
        "vocab_size": vocabulary, "feed_forward_length": 0, "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": config.number("layer_norm_epsilon", 1e-5),
        "ssm.conv_kernel": taps, "ssm.inner_size": d_inner, "ssm.state_size": d_state,
        "ssm.time_step_rank": rank, "ssm.dt_b_c_rms": falcon,
    }  # fmt: skip
    result = Plan("mamba", keys)
    if falcon:
        eps = keys["ssm.dt_b_c_rms_epsilon"] = config.number("mixer_rms_eps", 1e-6)
        if eps != keys["attention.layer_norm_rms_epsilon"]:
            result.remarks.append(
                f"keelback only: dt, B and C are normalised with an epsilon of {eps:g}; "
                "llama.cpp takes the model's, and its logits will differ"
            )
    if d_inner != 2 * d_model:
        result.remarks.append(
            f"keelback only: the inner size {d_inner} is not twice the hidden size {d_model}"
        )
    result.add("token_embd.weight", (vocabulary, d_model), embedding)
    result.add("output_norm.weight", (d_model,), checkpoint.require("backbone.norm_f.weight"))
    add_head(result, checkpoint, vocabulary, d_model)
    for i in range(layers):
        layer, blk = f"backbone.layers.{i}", f"blk.{i}"
        mixer = f"{layer}.mixer"
        result.add(
            f"{blk}.attn_norm.weight", (d_model,), checkpoint.require(f"{layer}.norm.weight")
        )
        result.add(
            f"{blk}.ssm_in.weight",
            (2 * d_inner, d_model),
            checkpoint.require(f"{mixer}.in_proj.weight"),
        )
        add_conv(result, checkpoint, mixer, blk, d_inner, taps)
        result.add(
            f"{blk}.ssm_x.weight",
            (rank + 2 * d_state, d_inner),
            checkpoint.require(f"{mixer}.x_proj.weight"),
        )
        result.add(
            f"{blk}.ssm_dt.weight", (d_inner, rank), checkpoint.require(f"{mixer}.dt_proj.weight")
        )
        result.add(f"{blk}.ssm_dt.bias", (d_inner,), checkpoint.require(f"{mixer}.dt_proj.bias"))
        a_log = checkpoint.require(f"{mixer}.A_log")
        result.add(f"{blk}.ssm_a", (d_inner, d_state), a_log, transform=negative_exp)
        result.add(f"{blk}.ssm_d", (d_inner,), checkpoint.require(f"{mixer}.D"))
        result.add(
            f"{blk}.ssm_out.weight",
            (d_model, d_inner),
            checkpoint.require(f"{mixer}.out_proj.weight"),
        )
        add_projection_biases(result, checkpoint, mixer, blk, 2 * d_inner, d_model)
    return result


def add_head(result: Plan, checkpoint: Checkpoint, vocabulary: int, d_model: int) -> None:
    """The output matrix, unless it is the embedding again."""
    head = checkpoint.tensors.get("lm_head.weight")
    embedding = checkpoint.require("backbone.embeddings.weight", "backbone.embedding.weight")
    if head is None or (
        head.shape == embedding.shape and np.array_equal(head.read(), embedding.read())
    ):
        return
    result.add("output.weight", (vocabulary, d_model), head)


def add_conv(
    result: Plan, checkpoint: Checkpoint, mixer: str, blk: str, channels: int, taps: int
) -> None:
    """The causal convolution; llama.cpp demands a bias, so a missing one becomes zeros."""
    weight = checkpoint.require(f"{mixer}.conv1d.weight")
    result.add(f"{blk}.ssm_conv1d.weight", (channels, taps), weight)
    bias = checkpoint.tensors.get(f"{mixer}.conv1d.bias")
    if bias is None:
        result.add(
            f"{blk}.ssm_conv1d.bias", (channels,), transform=lambda: np.zeros(channels, np.float32)
        )
    else:
        result.add(f"{blk}.ssm_conv1d.bias", (channels,), bias)


def add_projection_biases(
    result: Plan, checkpoint: Checkpoint, mixer: str, blk: str, inner: int, d_model: int
) -> None:
    """`use_bias`: llama.cpp has no slot for these."""
    for hf, gguf, size in (("in_proj", "ssm_in", inner), ("out_proj", "ssm_out", d_model)):
        bias = checkpoint.tensors.get(f"{mixer}.{hf}.bias")
        if bias is not None:
            result.add(f"{blk}.{gguf}.bias", (size,), bias)
            remark = "keelback only: the projections have biases (ssm_in.bias, ssm_out.bias)"
            if remark not in result.remarks:
                result.remarks.append(remark)
