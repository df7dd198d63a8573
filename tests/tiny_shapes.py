"""Names and shapes of a tiny checkpoint's tensors, as its family's config.json asks for them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _mamba_shapes(c: dict[str, Any]) -> Shapes:
    hidden, inner, state = c["hidden_size"], c["intermediate_size"], c["state_size"]
    rank = c["time_step_rank"] if c["time_step_rank"] != "auto" else math.ceil(hidden / 16)
    yield "backbone.embeddings.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"backbone.layers.{i}."
        yield at + "norm.weight", (hidden,)
        yield at + "mixer.in_proj.weight", (2 * inner, hidden)
        yield at + "mixer.conv1d.weight", (inner, 1, c["conv_kernel"])
        yield at + "mixer.x_proj.weight", (rank + 2 * state, inner)
        yield at + "mixer.dt_proj.weight", (inner, rank)
        yield at + "mixer.dt_proj.bias", (inner,)
        yield at + "mixer.A_log", (inner, state)
        yield at + "mixer.D", (inner,)
        yield at + "mixer.out_proj.weight", (hidden, inner)
        if c["use_conv_bias"]:
            yield at + "mixer.conv1d.bias", (inner,)
        if c["use_bias"]:
            yield at + "mixer.in_proj.bias", (2 * inner,)
            yield at + "mixer.out_proj.bias", (hidden,)
    yield "backbone.norm_f.weight", (hidden,)


def _mamba2_shapes(c: dict[str, Any]) -> Shapes:
    hidden, heads = c["hidden_size"], c["num_heads"]
    inner = heads * c["head_dim"]
    conv = inner + 2 * c["n_groups"] * c["state_size"]
    yield "backbone.embeddings.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"backbone.layers.{i}."
        yield at + "norm.weight", (hidden,)
        yield at + "mixer.in_proj.weight", (inner + conv + heads, hidden)
        yield at + "mixer.conv1d.weight", (conv, 1, c["conv_kernel"])
        yield at + "mixer.dt_bias", (heads,)
        yield at + "mixer.A_log", (heads,)
        yield at + "mixer.D", (heads,)
        yield at + "mixer.norm.weight", (inner,)
        yield at + "mixer.out_proj.weight", (hidden, inner)
        if c["use_conv_bias"]:
            yield at + "mixer.conv1d.bias", (conv,)
        if c["use_bias"]:
            yield at + "mixer.in_proj.bias", (inner + conv + heads,)
            yield at + "mixer.out_proj.bias", (hidden,)
    yield "backbone.norm_f.weight", (hidden,)


def _gdn_shapes(c: dict[str, Any]) -> Shapes:
    hidden = c["hidden_size"]
    # Without an intermediate_size the library rounds 2/3 of the ratio up to a multiple of 256.
    middle = c["intermediate_size"] or -(-int(hidden * c["hidden_ratio"] * 2 / 3) // 256) * 256
    yield "model.embeddings.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        yield at + "attn_norm.weight", (hidden,)
        yield from _gdn_mixer_shapes(c, i, at + "attn.")
        yield at + "mlp_norm.weight", (hidden,)
        yield at + "mlp.gate_proj.weight", (middle, hidden)
        yield at + "mlp.up_proj.weight", (middle, hidden)
        yield at + "mlp.down_proj.weight", (hidden, middle)
    yield "model.norm.weight", (hidden,)


def _gdn_mixer_shapes(c: dict[str, Any], i: int, at: str) -> Shapes:
    """Gated DeltaNet, or attention in the layers that `attn` names."""
    hidden, v_heads = c["hidden_size"], c["num_v_heads"] or c["num_heads"]
    head_v = int(c["head_dim"] * c["expand_v"])
    key, value = c["num_heads"] * c["head_dim"], v_heads * head_v
    given = c["attn"] if isinstance(c["attn"], list) else [c["attn"] or {"layers": []}]
    for attn in given:
        if i in attn["layers"]:
            shared = hidden // attn["num_heads"] * attn.get("num_kv_heads", attn["num_heads"])
            for part, rows in (("q", hidden), ("k", shared), ("v", shared), ("o", hidden)):
                yield at + f"{part}_proj.weight", (rows, hidden)
                if attn.get("qkv_bias") and part != "o":
                    yield at + f"{part}_proj.bias", (rows,)
            return
    for part, rows in (("q", key), ("k", key), ("v", value)):
        yield at + f"{part}_proj.weight", (rows, hidden)
        if c["use_short_conv"]:
            yield at + f"{part}_conv1d.weight", (rows, 1, c["conv_size"])
    yield at + "a_proj.weight", (v_heads, hidden)
    yield at + "b_proj.weight", (v_heads, hidden)
    yield at + "A_log", (v_heads,)
    yield at + "dt_bias", (v_heads,)
    if c["use_gate"]:
        yield at + "g_proj.weight", (value, hidden)
    yield at + "o_norm.weight", (head_v,)
    yield at + "o_proj.weight", (hidden, value)


def _hybrid_mixer_shapes(c: dict[str, Any], i: int) -> Shapes:
    """Attention or Mamba-2, as granitemoehybrid and bamba have them."""
    hidden, heads, at = c["hidden_size"], c["mamba_n_heads"], f"model.layers.{i}."
    types = c.get("layer_types")
    attends = types[i] in ("attention", "full_attention") if types else i in c["attn_layer_indices"]
    if attends:
        keys = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
        for part, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            yield at + f"self_attn.{part}_proj.weight", (rows, hidden)
            if c["attention_bias"]:
                yield at + f"self_attn.{part}_proj.bias", (rows,)
        return
    inner = c["mamba_expand"] * hidden
    conv = inner + 2 * c["mamba_n_groups"] * c["mamba_d_state"]
    yield at + "mamba.in_proj.weight", (inner + conv + heads, hidden)
    yield at + "mamba.conv1d.weight", (conv, 1, c["mamba_d_conv"])
    yield at + "mamba.conv1d.bias", (conv,)
    for vector in ("dt_bias", "A_log", "D"):
        yield at + f"mamba.{vector}", (heads,)
    yield at + "mamba.norm.weight", (inner,)
    yield at + "mamba.out_proj.weight", (hidden, inner)
    if c["mamba_proj_bias"]:
        yield at + "mamba.in_proj.bias", (inner + conv + heads,)
        yield at + "mamba.out_proj.bias", (hidden,)


def _granite_shapes(c: dict[str, Any]) -> Shapes:
    hidden, experts = c["hidden_size"], c["num_local_experts"]
    middle, shared = c["intermediate_size"], c["shared_intermediate_size"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        yield from _hybrid_mixer_shapes(c, i)
        yield at + "post_attention_layernorm.weight", (hidden,)
        if experts:
            yield at + "block_sparse_moe.router.layer.weight", (experts, hidden)
            yield at + "block_sparse_moe.input_linear.weight", (experts, 2 * middle, hidden)
            yield at + "block_sparse_moe.output_linear.weight", (experts, hidden, middle)
        yield at + "shared_mlp.input_linear.weight", (2 * shared, hidden)
        yield at + "shared_mlp.output_linear.weight", (hidden, shared)
    yield "model.norm.weight", (hidden,)


def _bamba_shapes(c: dict[str, Any]) -> Shapes:
    hidden, middle = c["hidden_size"], c["intermediate_size"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        yield from _hybrid_mixer_shapes(c, i)
        yield at + "pre_ff_layernorm.weight", (hidden,)
        sizes = (("gate", middle, hidden), ("up", middle, hidden), ("down", hidden, middle))
        for part, *shape in sizes:
            yield at + f"feed_forward.{part}_proj.weight", tuple(shape)
            if c["mlp_bias"]:
                yield at + f"feed_forward.{part}_proj.bias", (shape[0],)
    yield "model.final_layernorm.weight", (hidden,)


SHAPES: dict[str, Callable[[dict[str, Any]], Shapes]] = {
    "granitemoehybrid": _granite_shapes,
    "bamba": _bamba_shapes,
    "mamba": _mamba_shapes,
    "falcon_mamba": _mamba_shapes,
    "mamba2": _mamba2_shapes,
    "gated_deltanet": _gdn_shapes,
}
