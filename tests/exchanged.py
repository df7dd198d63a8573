"""Which of the tiny checkpoints llama.cpp can run, and from whose files; needs no llama.cpp."""

from __future__ import annotations

import tiny


def is_representable(variant: tiny.Variant) -> bool:
    """Whether llama.cpp has a way to say what this checkpoint is."""
    config = variant.config
    if family := tiny.FAMILIES.get(variant.model_type):
        return variant.name in family.llamacpp + family.misread
    if variant.model_type in ("granitemoehybrid", "bamba"):
        return not config["mamba_proj_bias"]
    if variant.model_type == "gated_deltanet" or config["use_bias"]:
        return False
    if variant.model_type == "mamba2":
        return config["num_heads"] * config["head_dim"] == 2 * config["hidden_size"]
    mixer_eps = config.get("mixer_rms_eps", config["layer_norm_epsilon"])
    return config["expand"] == 2 and mixer_eps == config["layer_norm_epsilon"]


TINY = tuple(name for name, variant in tiny.VARIANTS.items() if is_representable(variant))
# What their converter misreads: a Granite with rotary positions has none for it unless all layers
# are attention, layers are not called as transformers 5 does it, and of Bamba's heads, which are
# turned in part, it rearranges the whole. The files it makes of the second and the third load all
# the same.
MISREAD = ("granite-rope", "granite-q8", "bamba-grouped")
MISREAD += tuple(name for family in tiny.FAMILIES.values() for name in family.misread)
AS_WRITTEN = tuple(
    name
    for name in TINY
    if (family := tiny.FAMILIES.get(tiny.VARIANTS[name].model_type)) and family.as_written
)
# llama.cpp wants a bias of the convolution. Our converter writes zeros, theirs nothing.
BIASED = tuple(
    name
    for name in TINY
    if name not in MISREAD and tiny.VARIANTS[name].config.get("use_conv_bias", True)
)
