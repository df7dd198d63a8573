"""Hugging Face `mamba` and `falcon_mamba` to GGUF `mamba`."""

from __future__ import annotations

import math

from .checkpoint import Checkpoint
from .config import Config
from .layers import CONTEXT_LENGTH, add_conv, add_ends, add_projection_biases, remark_inner_size
from .mamba_ssm import FLA_KEYS, add_layer, layer_keys
from .plan import Part, Plan, negative_exp

MODEL_TYPES = ("mamba", "falcon_mamba")
#: The classes of configs that do not name their type.
CLASSES = {"MambaForCausalLM": "mamba", "FalconMambaForCausalLM": "falcon_mamba"}
SPELLINGS = FLA_KEYS


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of `mamba`."""
    config = checkpoint.config
    config.one_of("hidden_act", "silu", "silu", "swish")
    d_model, layers = config.count("hidden_size"), config.count("num_hidden_layers")
    given = config.get("intermediate_size") is not None
    expanded = max(1, int(config.number("expand", 2) * d_model))
    d_inner = config.count("intermediate_size") if given else expanded
    automatic = config.get("time_step_rank", "auto") == "auto"
    rank = math.ceil(d_model / 16) if automatic else config.count("time_step_rank")
    keys = {
        "context_length": CONTEXT_LENGTH, "embedding_length": d_model, "block_count": layers,
        **layer_keys(config),
        "attention.layer_norm_rms_epsilon": config.number("layer_norm_epsilon", 1e-5),
        "ssm.conv_kernel": config.count("conv_kernel", 4), "ssm.inner_size": d_inner,
        "ssm.state_size": config.count("state_size", 16), "ssm.time_step_rank": rank,
    }  # fmt: skip
    result = Plan("mamba", keys)
    remark_inner_size(result)
    _add_inner_norms(result, config)
    add_ends(result, checkpoint, "model.embeddings.weight", "model.norm_f.weight")
    for i in range(layers):
        add_layer(result, checkpoint, i, add_mixer)
    return result


def _add_inner_norms(result: Plan, config: Config) -> None:
    """Falcon-Mamba normalises dt, B and C, with an epsilon that llama.cpp has no key for."""
    falcon = config.get("model_type") == "falcon_mamba"
    result.keys["ssm.dt_b_c_rms"] = falcon
    if falcon:
        eps = result.keys["ssm.dt_b_c_rms_epsilon"] = config.number("mixer_rms_eps", 1e-6)
        if eps != result.keys["attention.layer_norm_rms_epsilon"]:
            result.remark(
                f"for keelback only: dt, B and C are normalised with an epsilon of {eps:g}; "
                "llama.cpp takes the model's, and its logits will differ"
            )


def add_mixer(result: Plan, checkpoint: Checkpoint, mixer: str, blk: str) -> None:
    """The tensors of a Mamba-1 mixer, whose names begin with `mixer` in the checkpoint."""
    keys, need = result.keys, checkpoint.require
    d_model, d_inner = keys["embedding_length"], keys["ssm.inner_size"]
    d_state, rank = keys["ssm.state_size"], keys["ssm.time_step_rank"]
    matrices = {
        "in_proj": ("ssm_in", 2 * d_inner, d_model),
        "x_proj": ("ssm_x", rank + 2 * d_state, d_inner),
        "dt_proj": ("ssm_dt", d_inner, rank), "out_proj": ("ssm_out", d_model, d_inner),
    }  # fmt: skip
    for hf, (gguf, *shape) in matrices.items():
        result.add(f"{blk}.{gguf}.weight", tuple(shape), need(f"{mixer}.{hf}.weight", *shape))
    result.add(f"{blk}.ssm_dt.bias", (d_inner,), need(f"{mixer}.dt_proj.bias", d_inner))
    add_conv(result, checkpoint, mixer, blk, d_inner)
    a_log = Part(need(f"{mixer}.A_log", d_inner, d_state), function=negative_exp)
    result.add(f"{blk}.ssm_a", (d_inner, d_state), a_log)
    result.add(f"{blk}.ssm_d", (d_inner,), need(f"{mixer}.D", d_inner))
    add_projection_biases(result, checkpoint, mixer, blk, 2 * d_inner)
