"""Layouts in which checkpoints of Qwen3-Next and Qwen3.5 are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tiny_files import Raw, raw, read
from tiny_layouts import SAFETENSORS, Config, Layout, Tensors, in_shards

#: Parts of the published checkpoints that are no part of the language model.
VISION = ("model.visual.blocks.0.attn.qkv.weight", "model.visual.patch_embed.proj.bias")
MTP = ("mtp.fc.weight", "mtp.layers.0.mlp.gate_proj.weight", "mtp.norm.weight")


def changed(*less: str, **more: Any) -> Callable[[Config], Config]:
    """A config without some keys and with others."""
    return lambda theirs: {k: v for k, v in theirs.items() if k not in less} | more


def wrapped(kind: str, inner: Callable[[Config], Config] = dict, **outer: Any):
    """The model with its vision tower: the language model's config is a part of the config."""

    def config(theirs: Config) -> Config:
        vision = {"model_type": kind, "hidden_size": 7, "depth": 1}
        common = {"model_type": kind, "architectures": ["ForConditionalGeneration"]}
        return common | {"text_config": inner(theirs), "vision_config": vision} | outer

    return config


def below(prefix: str, *others: str) -> Callable[[Tensors], Tensors]:
    """Names with another beginning than `model.`, and tensors of other parts."""

    def tensors(theirs: Tensors) -> Tensors:
        named = {
            name.replace("model.", prefix, 1) if name.startswith("model.") else name: tensor
            for name, tensor in theirs.items()
        }
        return named | {other: raw(np.ones((3, 5), np.float32)) for other in others}

    return tensors


def one_by_one(tensors: Tensors) -> Tensors:
    """Experts as transformers 5 saves them again: three matrices for each."""
    single: Tensors = {}
    for name, tensor in tensors.items():
        prefix, _, part = name.rpartition(".")
        if part not in ("gate_up_proj", "down_proj"):
            single[name] = tensor
            continue
        for expert, values in enumerate(read(tensor)):
            parts = {"down_proj": values}
            if part == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), np.split(values, 2), strict=True))
            for each, matrix in parts.items():
                single[f"{prefix}.{expert}.{each}.weight"] = raw(matrix)
    return single


def stacked(tensors: Tensors) -> Tensors:
    """Experts of a layer in one tensor for each of their matrices, as modules of their own."""
    stacks: dict[str, list[np.ndarray]] = {}
    rest: dict[str, Raw] = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            rest[name] = tensor
            continue
        prefix, _, end = name.partition(".experts.")
        stacks.setdefault(f"{prefix}.experts.{end.partition('.')[2]}", []).append(read(tensor))
    return rest | {name: raw(np.stack(matrices)) for name, matrices in stacks.items()}


def old_rope(theirs: Config) -> Config:
    """transformers 4: base and part beside the rest, and another word for the kind."""
    rope = dict(theirs["rope_parameters"])
    outer = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor")}
    kind = rope.pop("rope_type")
    rope["type"] = "mrope" if kind == "default" else kind
    return changed("rope_parameters", rope_scaling=rope, **outer)(theirs)


def yarn_beside(theirs: Config) -> Config:
    """What the cards of the models tell users to put into the config for long texts."""
    return changed(rope_parameters=theirs["rope_parameters"] | {"attention_factor": None})(theirs)


HUB = below("model.language_model.", *VISION, *MTP)
LAYOUTS: dict[str, Layout] = {
    "qwen3.5 of the hub": Layout(
        "qwen35-dense", wrapped("qwen3_5", tie_word_embeddings=True), HUB,
        in_shards(SAFETENSORS, 2),
    ),
    "qwen3.5 of the hub, tied outside": Layout(
        "qwen35-dense",
        wrapped("qwen3_5", changed(tie_word_embeddings=False), tie_word_embeddings=True), HUB,
    ),
    "qwen3.5 of the hub, tied inside": Layout(
        "qwen35-dense", wrapped("qwen3_5", tie_word_embeddings=False), HUB,
    ),
    "qwen3.5 of the hub, its head unsaid": Layout(
        "qwen35-q8", wrapped("qwen3_5", changed("tie_word_embeddings")), HUB,
    ),
    "qwen3.5 of the hub, experts": Layout("qwen35moe-fused", wrapped("qwen3_5_moe"), HUB),
    "qwen3.5, experts one by one": Layout("qwen35moe-fused", tensors=one_by_one),
    "qwen3.5, every second layer": Layout(
        "qwen35-dense", changed("layer_types", full_attention_interval=2)
    ),
    "qwen3.5, kinds of layers of v4": Layout(
        "qwen35-dense", changed(layer_types=["mamba", "attention"] * 2)
    ),
    "qwen3.5, base model": Layout(
        "qwen35-dense", changed(architectures=["Qwen3_5TextModel"]), below("")
    ),
    "qwen3.5 of the hub, text alone": Layout("qwen35-q8", tensors=below("model.language_model.")),
    "qwen3.5, rotary positions of v4": Layout("qwen35-q8", old_rope),
    "qwen3.5, yarn of v4": Layout("qwen35-yarn", old_rope),
    "qwen3.5, yarn that names nothing new": Layout("qwen35-yarn", yarn_beside),
    "qwen3-next with mtp layers": Layout("next-moe", tensors=below("model.", *MTP)),
    "qwen3-next, mtp layers inside": Layout(
        "next-moe", tensors=below("model.", *(f"model.{name}" for name in MTP))
    ),
    "qwen3-next, experts stacked": Layout("next-q8", tensors=stacked),
    "qwen3-next, options that change nothing": Layout(
        "next-moe",
        changed(
            attn_output_gate=True, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True
        ),
    ),
}  # fmt: skip
