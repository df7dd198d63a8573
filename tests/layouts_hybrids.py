"""LFM2, OLMo-Hybrid, Nemotron-H, Falcon-H1 and Jamba in the layouts that they are found in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from layouts_qwen import changed

import tiny
from tiny_files import raw, read
from tiny_layouts import Config, Layout, Tensors, named


def _in_memory(variant: str) -> Callable[[Tensors], Tensors]:
    """The names and stacks of experts that transformers 5 has in memory."""
    family = tiny.FAMILIES[tiny.VARIANTS[variant].model_type]
    values = family.in_memory(tiny.weights(variant))
    return lambda theirs: {name: raw(array) for name, array in values.items()}


# LFM2.


def _saved_lfm2(theirs: Config) -> Config:
    """As transformers 5 writes it."""
    chosen = theirs["full_attn_idxs"]
    kinds = ["full_attention" if i in chosen else "conv" for i in range(4)]
    rope = {"rope_type": "default", "rope_theta": theirs["rope_theta"]}
    more = {"rope_parameters": rope, "layer_types": kinds}
    return changed("rope_theta", "full_attn_idxs", **more)(theirs)


def _in_vision_model(theirs: Tensors) -> Tensors:
    inner = named(("model.", "model.language_model."))(theirs)
    return inner | {"model.vision_tower.layers.0.norm.weight": raw(np.ones(3, np.float32))}


# OLMo-Hybrid.


def _saved_olmo(theirs: Tensors) -> Tensors:
    """transformers 5: convolutions in equal thirds, and one name for two norms."""
    values = {name: read(tensor) for name, tensor in theirs.items()}
    for name in [name for name in values if name.endswith("q_conv1d.weight")]:
        names = [name.replace("q_conv", f"{part}_conv") for part in "qkv"]
        whole = np.concatenate([values[n] for n in names])
        third = -(-len(whole) // 3)
        values |= dict(zip(names, np.split(whole, [third, 2 * third]), strict=True))
    name = "post_attention_layernorm"
    renamed = {k.replace(name, "feedforward_layer_norm"): v for k, v in values.items()}
    return {name: raw(array) for name, array in renamed.items()}


_OLMO_IN_MEMORY = named(
    ("attention_layer_norm", "input_layernorm"),
    ("feedforward_layer_norm", "post_attention_layernorm"),
)


# Nemotron-H, Falcon-H1 and Jamba.


def _with_others(theirs: Tensors) -> Tensors:
    """What stands beside a language model: a vision tower, and layers that guess further tokens."""
    spare = {"vision_model.patch.weight": (4, 4), "mtp.layers.0.eh_proj.weight": (4, 8)}
    inner = {f"language_model.{name}": tensor for name, tensor in theirs.items()}
    return inner | {name: raw(np.ones(shape, np.float32)) for name, shape in spare.items()}


def _by_list(theirs: Config) -> Config:
    """A list of layers, with no number of them beside it, and another name for heads' size."""
    kinds = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    more: dict[str, Any] = {
        "attention_head_dim": theirs["head_dim"],
        "layers_block_type": [kinds[mark] for mark in theirs["hybrid_override_pattern"]],
    }
    return changed("num_hidden_layers", "head_dim", "hybrid_override_pattern", **more)(theirs)


def _renamed_keys(**names: str) -> Callable[[Config], Config]:
    """A config whose keys have other names."""
    return lambda theirs: {names.get(key, key): value for key, value in theirs.items()}


def _saved_falcon(theirs: Config) -> Config:
    rope = {"rope_theta": theirs["rope_theta"], "rope_type": "default"}
    return changed("rope_theta", rope_parameters=rope, mamba_d_head="auto")(theirs)


_EARLY_JAMBA = named(
    ("pre_ff_layernorm", "pre_moe_layernorm"), ("b_layernorm", "B_layernorm"),
    ("c_layernorm", "C_layernorm"), ("feed_forward.gate", "moe.experts.0.gate"),
    ("feed_forward.up", "moe.experts.0.up"), ("feed_forward.down", "moe.experts.0.down"),
    ("feed_forward.", "moe."),
)  # fmt: skip

LAYOUTS: dict[str, Layout] = {
    "lfm2, experts stacked": Layout("lfm2moe-bias", tensors=_in_memory("lfm2moe-bias")),
    "lfm2, no bias, experts stacked": Layout("lfm2moe-plain", tensors=_in_memory("lfm2moe-plain")),
    "lfm2 of v5": Layout("lfm2-adjusted", _saved_lfm2),
    "lfm2 of the hub": Layout(
        "lfm2-adjusted",
        lambda theirs: theirs | {"block_ff_dim": theirs["intermediate_size"], "num_heads": 4},
    ),
    "lfm2, a part of LFM2-VL": Layout(
        "lfm2-dense",
        lambda theirs: {"model_type": "lfm2_vl", "text_config": theirs, "eos_token_id": 2},
        _in_vision_model,
    ),
    "olmo of v5": Layout("olmo-nope", tensors=_saved_olmo),
    "olmo of v5, value heads that share keys": Layout("olmo-rope", tensors=_saved_olmo),
    "olmo, norms as in memory": Layout("olmo-rope", tensors=_OLMO_IN_MEMORY),
    "olmo, no angle in what there is of them": Layout(
        "olmo-nope", changed(rope_parameters={"rope_theta": None})
    ),
    "olmo, an angle outside": Layout(
        "olmo-rope", changed(rope_theta=300.0, rope_parameters=None)
    ),
    "nemotron, a list of layers": Layout("nemotron-latent", _by_list),
    "nemotron, keys of old": Layout(
        "nemotron-moe",
        _renamed_keys(
            n_groups="mamba_n_groups",
            conv_kernel="mamba_d_conv",
            n_routed_experts="num_local_experts",
        ),
    ),
    "nemotron, experts stacked": Layout("nemotron-moe", tensors=_in_memory("nemotron-moe")),
    "nemotron, all groups": Layout("nemotron-moe", changed(n_group=3, topk_group=3)),
    "nemotron, a part of Nano-VL": Layout(
        "nemotron-moe",
        lambda theirs: {"model_type": "NemotronH_Nano_VL_V2", "llm_config": theirs},
        _with_others,
    ),
    "nemotron, names of adapters": Layout(
        "nemotron-dense", tensors=named(("backbone.", "model."))
    ),
    "jamba, early names": Layout("jamba-moe", tensors=_EARLY_JAMBA),
    "jamba, experts by another name": Layout(
        "jamba-moe", _renamed_keys(num_experts="num_local_experts")
    ),
    "jamba, experts stacked": Layout("jamba-moe", tensors=_in_memory("jamba-moe")),
    "falcon-h1 of v5": Layout("falcon-h1-plain", _saved_falcon),
}  # fmt: skip
