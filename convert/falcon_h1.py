"""Hugging Face `falcon_h1` to GGUF `falcon-h1`.

The model multiplies what its parts read and write (arXiv 2203.03466). There is no place for that in
a GGUF, so the matrices are multiplied, in float32 and in the order of llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile, UnsupportedModel
from .checkpoint import Checkpoint
from .config import Config
from .experts import NAMES
from .layers import add_attention, add_ends, add_mlp, add_norm, head_counts
from .mamba2 import add_mixer, remark_limit
from .plan import Part, Plan, Tensor
from .rope import rope_keys

MODEL_TYPES = ("falcon_h1",)

#: What numbers are multiplied with, one factor after the other.
Factors = tuple[float, ...]
#: Pieces of a tensor: how many rows (of a bias, numbers) each has, and its factors.
Segments = list[tuple[int, Factors]]


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of `falcon-h1`."""
    config = checkpoint.config
    config.one_of("hidden_act", "silu", "silu", "swish")
    d_model, d_ff = config.count("hidden_size"), config.count("intermediate_size")
    keys = {
        "context_length": config.count("max_position_embeddings", 8192),
        "embedding_length": d_model,
        "block_count": config.count("num_hidden_layers"),
        "feed_forward_length": d_ff,
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-5),
        **_attention_keys(config, d_model),
        **_mixer_keys(config, d_model),
    }
    result = Plan("falcon-h1", keys)
    normed = config.flag("mamba_rms_norm", False)
    if normed and config.flag("mamba_norm_before_gate", True):
        keys["ssm.norm_before_gate"] = True
        result.remark("for keelback only: the norm of the mixer stands before its gate")
    remark_limit(result, config)
    add_ends(result, checkpoint, "model.embed_tokens.weight", "model.final_layernorm.weight")
    for i in range(keys["block_count"]):
        layer, blk = f"model.layers.{i}", f"blk.{i}"
        add_norm(result, checkpoint, f"{layer}.input_layernorm", f"{blk}.attn_norm", d_model)
        add_mixer(result, checkpoint, f"{layer}.mamba", blk, normed)
        _add_attention(result, checkpoint, i)
        # This name has no suffix in llama.cpp.
        norm = checkpoint.require(f"{layer}.pre_ff_layernorm.weight", d_model)
        result.add(f"{blk}.ffn_norm", (d_model,), norm)
        add_mlp(result, checkpoint, f"{layer}.feed_forward", blk, d_ff, d_model, NAMES)
    _multiply(result, config)
    return result


def _attention_keys(config: Config, d_model: int) -> dict[str, Any]:
    heads, key_heads = head_counts(config)
    d_head = config.count("head_dim", d_model // heads)
    rope = rope_keys(config, d_head, 10000.0)
    # llama.cpp takes this from the length of keys.
    if (turned := rope.pop("rope.dimension_count")) != d_head:
        raise UnsupportedModel(
            f"{config.path}: partial_rotary_factor turns {turned} values of {d_head}; keelback "
            "runs this architecture with heads that are turned as a whole"
        )
    return {
        "attention.head_count": heads, "attention.head_count_kv": key_heads,
        "attention.key_length": d_head, "attention.value_length": d_head, **rope,
    }  # fmt: skip


def _mixer_keys(config: Config, d_model: int) -> dict[str, Any]:
    expanded = config.count("mamba_expand", 2) * d_model
    d_inner = config.count("mamba_d_ssm", expanded)
    heads, groups = config.count("mamba_n_heads", 128), config.count("mamba_n_groups", 1)
    automatic = config.get("mamba_d_head", "auto") == "auto"
    d_head = d_inner // heads if automatic else config.count("mamba_d_head")
    if heads % groups or d_head * heads != d_inner:
        raise InvalidFile(
            f"{config.path}: mamba_n_heads is {heads}, which does not go with mamba_n_groups "
            f"{groups}, mamba_d_head {d_head} and mamba_d_ssm {d_inner}"
        )
    return {
        "ssm.conv_kernel": config.count("mamba_d_conv", 4), "ssm.inner_size": d_inner,
        "ssm.state_size": config.count("mamba_d_state", 256), "ssm.time_step_rank": heads,
        "ssm.group_count": groups,
    }  # fmt: skip


def _add_attention(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    keys, hf = result.keys, f"model.layers.{i}.self_attn"
    d_model, d_head = keys["embedding_length"], keys["attention.key_length"]
    counts = keys["attention.head_count"], keys["attention.head_count_kv"]
    add_attention(result, checkpoint, hf, f"blk.{i}", d_model, counts, d_head)
    if checkpoint.find(f"{hf}.o_proj.bias") is not None:
        result.remark(
            "for keelback only: attention has a bias at its end (attn_output.bias), which "
            "llama.cpp leaves out"
        )


def _multiply(result: Plan, config: Config) -> None:
    """Fold the multipliers into the tensors of a plan."""
    _untie(result, config)
    factors, segments = _factors(config), _segments(result, config)
    for at, tensor in enumerate(result.tensors):
        name = tensor.name.split(".", 2)[-1] if tensor.name.startswith("blk.") else tensor.name
        if name in segments:
            result.tensors[at] = replace(tensor, parts=tuple(_apart(tensor, segments[name])))
        elif name in factors:
            (part,) = tensor.parts
            part = replace(part, function=_times(*factors[name]))
            result.tensors[at] = replace(tensor, parts=(part,))


def _untie(result: Plan, config: Config) -> None:
    """Where embedding and output are one matrix, but are not multiplied alike, make two of it."""
    table = next(tensor for tensor in result.tensors if tensor.name == "token_embd.weight")
    tied = all(tensor.name != "output.weight" for tensor in result.tensors)
    if tied and _one(config, "embedding_multiplier") != _one(config, "lm_head_multiplier"):
        result.add("output.weight", table.shape, *table.parts)


def _factors(config: Config) -> dict[str, Factors]:
    """Of all tensors but the mixer's first. What a part reads is multiplied in its matrix alone."""
    read, written = (_one(config, f"attention_{end}_multiplier") for end in ("in", "out"))
    key, mixed = _one(config, "key_multiplier"), _one(config, "ssm_out_multiplier")
    gate, down = _several(config, "mlp_multipliers", 2)
    return {
        "token_embd.weight": (_one(config, "embedding_multiplier"),),
        "output.weight": (_one(config, "lm_head_multiplier"),),
        "attn_q.weight": (read,), "attn_v.weight": (read,),
        "attn_k.weight": (key, read), "attn_k.bias": (key,),
        "attn_output.weight": (written,), "attn_output.bias": (written,),
        "ssm_out.weight": (mixed,), "ssm_out.bias": (mixed,),
        "ffn_gate.weight": (gate,), "ffn_gate.bias": (gate,),
        "ffn_down.weight": (down,), "ffn_down.bias": (down,),
    }  # fmt: skip


def _segments(result: Plan, config: Config) -> dict[str, Segments]:
    """Of the mixer's first projection: z, x, B, C and dt each have a multiplier of their own."""
    keys, read = result.keys, _one(config, "ssm_in_multiplier")
    d_inner, bc = keys["ssm.inner_size"], keys["ssm.group_count"] * keys["ssm.state_size"]
    widths = (d_inner, d_inner, bc, bc, keys["ssm.time_step_rank"])
    each = list(zip(widths, _several(config, "ssm_multipliers", 5), strict=True))
    return {
        "ssm_in.weight": [(width, (read, factor)) for width, factor in each],
        "ssm_in.bias": [(width, (factor,)) for width, factor in each],
    }


def _apart(tensor: Tensor, segments: Segments) -> Iterator[Part]:
    """The pieces of a tensor of one part, rows of a matrix or numbers of a bias."""
    (whole,), first = tensor.parts, 0
    for width, factors in segments:
        taken = np.arange(first, first + width)
        matrix = len(tensor.shape) > 1
        piece = replace(whole, rows=taken) if matrix else replace(whole, columns=taken)
        yield replace(piece, function=_times(*factors))
        first += width


def _times(*factors: float) -> Callable[[np.ndarray], np.ndarray] | None:
    """Multiply with one factor after the other; None where all are 1."""
    wanted = [np.float32(factor) for factor in factors if factor != 1]

    def multiply(values: np.ndarray) -> np.ndarray:
        for factor in wanted:
            values = values * factor
        return values

    return multiply if wanted else None


def _one(config: Config, key: str) -> float:
    return config.number(key, 1.0)


def _several(config: Config, key: str, count: int) -> list[float]:
    values = config.get(key, [1.0] * count)
    if not isinstance(values, list) or len(values) != count:
        raise InvalidFile(f"{config.path}: {key} is no list of {count} numbers")
    each = Config(config.path, {f"{key}[{i}]": value for i, value in enumerate(values)})
    return [each.number(name) for name in each.values]
