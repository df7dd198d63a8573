"""The tiny checkpoints in all the layouts that checkpoints of their families are found in.

A layout takes what transformers would write for a variant and says it as another program does: the
config's keys, the tensors' names and types, the files. The numbers stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tiny
from tiny_files import SAFETENSORS, TORCH, Raw, float8, raw, read, write_safetensors, write_shards

Config = dict[str, Any]
Tensors = dict[str, Raw]


def in_one(form: Any) -> Callable[[Path, Tensors], None]:
    """All tensors in one file."""
    stem, suffix, write = form
    return lambda folder, tensors: write(folder / f"{stem}{suffix}", tensors)


def in_shards(form: Any, count: int) -> Callable[[Path, Tensors], None]:
    """Several files and their index."""
    return lambda folder, tensors: write_shards(folder, tensors, form, count)


ONE_FILE = in_one(SAFETENSORS)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a variant is written, and what of it is given to the converter.

    inside, given: the folder of the files, and the path to convert, both below the folder of all.
    """

    variant: str
    config: Callable[[Config], Config] = dict
    tensors: Callable[[Tensors], Tensors] = dict
    write: Callable[[Path, Tensors], None] = ONE_FILE
    file: str = "config.json"
    inside: str = ""
    given: str = ""


def write(layout: Layout, folder: Path) -> Path:
    """Write a checkpoint; returns the path to convert."""
    variant = tiny.VARIANTS[layout.variant]
    inside = folder / layout.inside
    tiny.write_config(inside, layout.config(variant.config | {"dtype": variant.dtype}), layout.file)
    layout.write(inside, layout.tensors(tiny.stored(layout.variant)))
    return folder / layout.given


# Configs.


def _mamba_ssm(**options: Any) -> Callable[[Config], Config]:
    """mamba_ssm's keys; what `options` does not name is left to its defaults."""

    def config(theirs: Config) -> Config:
        return {
            "d_model": theirs["hidden_size"], "n_layer": theirs["num_hidden_layers"],
            "vocab_size": theirs["vocab_size"] - 5, "rms_norm": True, "residual_in_fp32": True,
            "fused_add_norm": True, "pad_vocab_size_multiple": theirs["vocab_size"], **options,
        }  # fmt: skip

    return config


def _codestral(theirs: Config) -> Config:
    return {
        "dim": theirs["hidden_size"], "n_layers": theirs["num_hidden_layers"],
        "vocab_size": theirs["vocab_size"], "n_groups": theirs["n_groups"], "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 1,
        "tie_embeddings": False, "model_type": "mamba",
    }  # fmt: skip


def _codestral_hf(theirs: Config) -> Config:
    """Keys of a draft of transformers, which never meant anything there."""
    unlimited = {"time_step_limit": [0.0, math.inf]}
    return (
        theirs | {"norm_before_gate": True, "rms_norm": True, "intermediate_size": 128} | unlimited
    )


def _leftovers(theirs: Config) -> Config:
    """state-spaces/mamba-*-hf: mamba_ssm's keys beside those of transformers."""
    return theirs | _mamba_ssm(ssm_cfg={}, d_inner=1)(theirs)


def _renamed(*keys: tuple[str, str], **more: Any) -> Callable[[Config], Config]:
    def config(theirs: Config) -> Config:
        names = dict(keys)
        return {names.get(key, key): value for key, value in theirs.items()} | more

    return config


def _without(*keys: str) -> Callable[[Config], Config]:
    return lambda theirs: {key: value for key, value in theirs.items() if key not in keys}


def _v5(theirs: Config) -> Config:
    """transformers 5: one name for each kind of layer, rotary parameters together, infinities."""
    config = _without("rope_theta", "rope_scaling")(theirs)
    kinds = {"mamba": "linear_attention", "attention": "full_attention"}
    config["layer_types"] = [kinds.get(kind, kind) for kind in theirs["layer_types"]]
    config["rope_parameters"] = {"rope_theta": theirs["rope_theta"], "rope_type": "default"}
    return config | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}


def _bamba_v4(theirs: Config) -> Config:
    return theirs | {"partial_rotary_factor": 0.5, "torch_dtype": "float32"}


def _bamba_v5(theirs: Config) -> Config:
    config = _without("rope_theta", "rope_scaling", "attn_rotary_emb")(theirs)
    rope = {"rope_theta": theirs["rope_theta"], "partial_rotary_factor": 0.5}
    return config | {"rope_parameters": rope | {"rope_type": "default"}}


def _block_types(theirs: Config) -> Config:
    config = _without("attn_layer_indices")(theirs)
    attention = theirs["attn_layer_indices"]
    kinds = ["attention" if i in attention else "mamba" for i in range(theirs["num_hidden_layers"])]
    return config | {"layers_block_type": kinds}


def _wrapper(key: str, kind: str) -> Callable[[Config], Config]:
    """A model of several kinds of input, its language model's config in an inner object."""

    def config(theirs: Config) -> Config:
        outer = {"model_type": kind, "architectures": ["ForConditionalGeneration"]}
        return outer | {key: theirs, "vision_config": {"hidden_size": 7}, "hidden_size": 7}

    return config


def _quantized(**how: Any) -> Callable[[Config], Config]:
    return lambda theirs: theirs | {"quantization_config": how}


def _compressed(strategy: str) -> Callable[[Config], Config]:
    weights = {"type": "float", "num_bits": 8, "strategy": strategy, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return _quantized(
        quant_method="compressed-tensors", format="float-quantized", config_groups=groups
    )


# Tensors.


def _names(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def named(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    """Parts of names replaced, one after the other."""

    def tensors(theirs: Tensors) -> Tensors:
        for old, new in pairs:
            theirs = {name.replace(old, new): tensor for name, tensor in theirs.items()}
        return theirs

    return tensors


def _singular(name: str) -> str:
    return name.replace("embeddings.", "embedding.")


def _with_head(tensors: Tensors) -> Tensors:
    """mamba_ssm stores the output matrix even where it is the embedding."""
    tensors = _names(_singular)(tensors)
    return {"lm_head.weight": tensors["backbone.embedding.weight"]} | tensors


def _below(prefix: str, *others: str) -> Callable[[Tensors], Tensors]:
    """A language model's tensors under a prefix, `model.` apart, and tensors of other parts."""

    def tensors(theirs: Tensors) -> Tensors:
        inner = {
            name if name.startswith("lm_head") else prefix + name.removeprefix("model."): tensor
            for name, tensor in theirs.items()
        }
        return inner | {other: raw(np.ones((3, 5), np.float32)) for other in others}

    return tensors


def _typed(kind_of: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        name: raw(read(tensor), kind_of(name)) for name, tensor in tensors.items()
    }


def _fused(tensors: Tensors) -> Tensors:
    """flash-linear-attention before its first release: gate and up in one matrix, gate first."""
    fused = {
        name: raw(np.concatenate([read(tensor), read(tensors[name.replace("gate", "up")])]))
        for name, tensor in tensors.items()
        if name.endswith("mlp.gate_proj.weight")
    }
    return {name: t for name, t in tensors.items() if "up_proj" not in name} | fused


def _mlx(tensors: Tensors) -> Tensors:
    """MLX keeps the taps of a convolution before its single input channel."""
    return {
        name: Raw(tensor.kind, (tensor.shape[0], tensor.shape[2], 1), tensor.data)
        if "conv1d.weight" in name
        else tensor
        for name, tensor in tensors.items()
    }


def _float8(
    variant: str, end: str, shape: Callable[[np.ndarray], np.ndarray], *more: str
) -> Callable[[Tensors], Tensors]:
    """Projections as float8, each with its factors, and tensors that describe activations."""
    block = tiny.VARIANTS[variant].float8
    assert block is not None

    def all_of(tensors: Tensors) -> Iterator[tuple[str, Raw]]:
        for name, tensor in tensors.items():
            if not tiny.is_float8(name, tensor.shape):
                yield name, tensor
                continue
            numbers, factors = float8(read(tensor), block)
            yield name, numbers
            yield name.replace("weight", end), raw(shape(factors))
            for other in more:
                yield name.replace("weight", other), raw(np.ones((), np.float32))

    return lambda tensors: dict(all_of(tensors))


# Files.


def _both_copies(folder: Path, tensors: Tensors) -> None:
    """The repository of Codestral: Mistral's files beside those of transformers."""
    write_shards(folder, tensors, SAFETENSORS, 3)
    tiny.write_config(folder, _codestral(tiny.VARIANTS["mamba2-codestral"].config), "params.json")
    theirs = _names(lambda name: f"model.{_singular(name)}")(tensors)
    write_safetensors(folder / "consolidated.safetensors", theirs)


def _made_by_mlx(folder: Path, tensors: Tensors) -> None:
    write_safetensors(folder / "model.safetensors", tensors, "mlx")


CONSOLIDATED = ("consolidated", ".safetensors", write_safetensors)
COMMIT = "models--org--tiny/snapshots/0123456789abcdef"
SECOND = {"layer": "Mamba2"}
#: Codestral's own names.
MISTRAL = _names(lambda name: f"model.{_singular(name)}")

LAYOUTS: dict[str, Layout] = {
    # The original state-spaces format.
    "mamba_ssm, all defaults": Layout("mamba-tied", _mamba_ssm(), _with_head, in_one(TORCH)),
    "mamba_ssm, Mamba-1": Layout(
        "mamba-expand3",
        _mamba_ssm(ssm_cfg={"expand": 3, "d_state": 8, "dt_rank": 3}, tie_embeddings=True),
        _with_head, in_one(TORCH),
    ),
    "mamba_ssm, no bias in the convolution": Layout(
        "mamba-noconvbias", _mamba_ssm(ssm_cfg={"conv_bias": False}, tie_embeddings=False),
        _names(_singular), in_one(TORCH),
    ),
    "mamba_ssm, biases": Layout(
        "mamba-bias", _mamba_ssm(ssm_cfg={"bias": True, "d_state": 5, "dt_rank": 2}), _with_head,
        in_one(TORCH),
    ),
    "mamba_ssm, Mamba-2, all defaults": Layout(
        "mamba2-silent", _mamba_ssm(ssm_cfg=SECOND), _with_head, in_one(TORCH)
    ),
    "mamba_ssm, Mamba-2": Layout(
        "mamba2-g4",
        _mamba_ssm(
            ssm_cfg={**SECOND, "headdim": 4, "ngroups": 4, "d_state": 20, "chunk_size": 64},
            d_intermediate=0, attn_layer_idx=[], attn_cfg={}, tie_embeddings=False,
        ),
        _names(_singular), in_one(TORCH),
    ),
    "mamba_ssm, safetensors": Layout(
        "mamba2-g1", _mamba_ssm(ssm_cfg={**SECOND, "headdim": 8, "d_state": 16}),
        _names(_singular),
    ),
    "mamba_ssm's keys beside those of transformers": Layout("mamba-tied", _leftovers),
    # Codestral's.
    "params.json": Layout(
        "mamba2-codestral", _codestral, MISTRAL, in_one(CONSOLIDATED), "params.json"
    ),
    "both copies of Codestral": Layout("mamba2-codestral", _codestral_hf, dict, _both_copies),
    "consolidated weights and config.json": Layout(
        "mamba2-codestral", _codestral_hf, MISTRAL, in_one(CONSOLIDATED)
    ),
    # flash-linear-attention's.
    "fla, gate fused": Layout("gdn-gate", tensors=_fused),
    "fla, no gate": Layout("gdn-nogate"),
    "fla, no convolution": Layout("gdn-noconv", _renamed(fuse_norm=True)),
    "fla, convolution and gate of v0.1": Layout(
        "gdn-gate", _without("num_v_heads", "allow_neg_eigval", "output_gate_activation")
    ),
    "fla's mamba": Layout(
        "mamba-untied",
        _renamed(("layer_norm_epsilon", "norm_eps"), ("time_step_rank", "dt_rank"), fuse_norm=True),
    ),
    "fla's mamba2": Layout(
        "mamba2-g2",
        _renamed(
            ("layer_norm_epsilon", "norm_eps"), ("time_step_limit", "dt_limit"), fuse_norm=True,
            rmsnorm=True, norm_before_gate=False, D_has_hdim=False,
        ),
    ),
    "fla's mamba2 of v0.1": Layout(
        "mamba2-g1", lambda theirs: _without("n_groups")(theirs) | {"fuse_norm": True}
    ),
    # Spellings of transformers 4 and 5.
    "granite of v4": Layout("granite-moe"),
    "granite of v5": Layout("granite-moe", _v5),
    "granite of v5, rotary positions": Layout("granite-rope", _v5),
    "bamba of v4": Layout("bamba-grouped", _bamba_v4),
    "bamba of v5": Layout("bamba-grouped", _bamba_v5),
    "bamba, layers_block_type": Layout("bamba-bias", _block_types),
    "mamba2, an infinity as an object": Layout("mamba2-g4"),
    "mamba2, an infinity as a word": Layout("mamba2-bias"),
    "no model_type": Layout("falcon-untied", _without("model_type")),
    "a base model without head": Layout(
        "mamba2-g2", _renamed(architectures=["Mamba2Model"]),
        _names(lambda name: name.removeprefix("backbone.")),
    ),
    "saved from a compiled module": Layout(
        "falcon-tied", tensors=_names(lambda name: f"_orig_mod.module.{name}")
    ),
    # Wrappers.
    "text_config, v5": Layout(
        "granite-rope", lambda theirs: _wrapper("text_config", "some_vl")(_v5(theirs)),
        _below("model.language_model.", "model.visual.blocks.0.attn.qkv.weight", "mtp.fc.weight"),
    ),
    "text_config, v4": Layout(
        "granite-moe", _wrapper("text_config", "llava"),
        lambda tensors: _names(lambda name: f"language_model.{name}")(tensors)
        | {"vision_tower.layers.0.norm.weight": raw(np.ones(3, np.float32))},
    ),
    "llm_config": Layout(
        "mamba-untied", _wrapper("llm_config", "some_chat"),
        lambda tensors: _names(lambda name: f"language_model.{name}")(tensors)
        | {"mlp1.0.weight": raw(np.ones(3, np.float32))},
    ),
    "mtp layers": Layout("granite-dense", tensors=_below("model.", "mtp.layers.0.norm.weight")),
    # Files and types.
    "one .bin": Layout("mamba2-g2", write=in_one(TORCH)),
    "sharded .bin": Layout("mamba2-sharded", write=in_shards(TORCH, 2)),
    "sharded safetensors": Layout("gdn-gva", write=in_shards(SAFETENSORS, 3)),
    "bf16 in a .bin": Layout("gdn-bf16", write=in_one(TORCH)),
    "f16 in a .bin": Layout("mamba-f16", write=in_shards(TORCH, 3)),
    "f64": Layout("gdn-negeig", tensors=_typed(lambda name: "F64"), write=in_one(TORCH)),
    "mixed types": Layout(
        "gdn-bf16", tensors=_typed(lambda name: "BF16" if "proj" in name else "F32")
    ),
    "one file with its config beside": Layout("mamba2-q8", given="model.safetensors"),
    "the hub's cache": Layout("gdn-q8", inside=COMMIT, given="models--org--tiny"),
    "MLX, not quantized": Layout("mamba2-g1", tensors=_mlx, write=_made_by_mlx),
    # float8.
    "fp8, blocks": Layout(
        "mamba2-float8", _quantized(quant_method="fp8", weight_block_size=[16, 12]),
        _float8("mamba2-float8", "weight_scale_inv", np.asarray),
    ),
    "compressed-tensors, channels": Layout(
        "mamba-float8", _compressed("channel"),
        _float8("mamba-float8", "weight_scale", np.asarray),
    ),
    "modelopt, whole matrices": Layout(
        "gdn-float8", _quantized(quant_method="modelopt", quant_algo="FP8"),
        _float8("gdn-float8", "weight_scale", lambda factors: factors[0, 0], "input_scale"),
    ),
}  # fmt: skip
