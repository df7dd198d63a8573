"""What Kimi Linear and Ling 3.0 have in common: delta attention, latent attention and experts.

What a layer is shows in its tensors. Configs have four ways of saying it, one of which counts from
one, and two programs read another one differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile
from .checkpoint import Checkpoint
from .config import Config
from .experts import NAMES, NUMBERED, add_experts, expert_groups
from .layers import add_linear, add_mlp, add_norm, refuse_attention_only
from .plan import Part, Plan, negative_exp
from .source import Transposed

#: The epsilon that transformers has in the norms of queries, keys and latent rows.
_EPS = 1e-6
_SIGMOID = 2
#: What the authors of both call keys of transformers.
AUTHORS_KEYS = {
    "max_position_embeddings": "model_max_length", "norm_topk_prob": "moe_renormalize",
    "num_local_experts": "num_experts", "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts", "n_group": "num_expert_group",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Delta:
    """Sizes of the layers of delta attention, and the form their parameters have.

    heads, d_value       heads and their values
    key_heads, d_key     keys and queries, which several heads may share
    taps                 of the convolutions; None where there are none
    gates                how names of the one or two matrices end that a gate has
    rate, shape          what A_log becomes, and the shape it has then in llama.cpp's files
    """

    heads: int
    d_value: int
    key_heads: int
    d_key: int
    taps: int | None
    gates: tuple[str, ...]
    rate: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, ...]


def model_keys(checkpoint: Checkpoint, delta: Delta) -> dict[str, Any]:
    """Keys that both architectures have.

    Raises UnsupportedModel where all layers are of attention, InvalidFile for a layer that is not
    there and for experts that do not go together.
    """
    config = checkpoint.config
    config.one_of("hidden_act", "silu", "silu", "swish")
    layers, heads = config.count("num_hidden_layers"), config.count("num_attention_heads")
    latent, turned = config.count("kv_lora_rank"), config.count("qk_rope_head_dim")
    attends = [_mixer_of(checkpoint, i)[1] for i in range(layers)]
    refuse_attention_only(config, attends)
    keys: dict[str, Any] = {
        "context_length": config.count("max_position_embeddings"),
        "embedding_length": config.count("hidden_size"),
        "block_count": layers,
        "feed_forward_length": config.count("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": [int(attention) for attention in attends],
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps"),
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + turned,
        "attention.key_length_mla": config.count("qk_nope_head_dim") + turned,
        "attention.value_length_mla": config.count("v_head_dim"),
        "rope.dimension_count": turned,
        "ssm.conv_kernel": delta.taps,
        "kda.head_dim": delta.d_key,
        **_expert_keys(checkpoint, config, layers),
    }
    if delta.heads != heads:
        keys["attention.head_count"] = [heads if here else delta.heads for here in attends]
    if config.get("q_lora_rank") is not None:
        keys["attention.q_lora_rank"] = config.count("q_lora_rank")
    if config.get("head_dim") is not None:
        # Says nothing of these models; llama.cpp's converter writes it all the same.
        keys["attention.value_length"] = config.count("head_dim")
    return keys


def _expert_keys(checkpoint: Checkpoint, config: Config, layers: int) -> dict[str, Any]:
    experts, used = config.count("num_local_experts"), config.count("num_experts_per_tok")
    groups, chosen = expert_groups(config, experts, used)
    dense = [_router_of(checkpoint, i) is None for i in range(layers)]
    return {
        "leading_dense_block_count": dense.index(False) if False in dense else layers,
        "expert_count": experts,
        "expert_used_count": used,
        "expert_group_count": groups,
        "expert_group_used_count": chosen,
        "expert_gating_func": _SIGMOID,
        "expert_feed_forward_length": config.count("moe_intermediate_size"),
        "expert_shared_count": config.count("n_shared_experts"),
        "expert_weights_scale": config.number("routed_scaling_factor"),
    }


def remark_differences(result: Plan) -> None:
    """Say what llama.cpp runs otherwise than transformers, or not at all."""
    keys = result.keys
    eps = keys["attention.layer_norm_rms_epsilon"]
    if eps != _EPS:
        result.remark(
            f"for keelback only: queries, keys and latent rows are normalised with an epsilon of "
            f"{_EPS:g}; llama.cpp takes the model's, {eps:g}, and its logits will differ"
        )
    if isinstance(keys["attention.head_count"], list):
        result.remark("for keelback only: delta attention has other heads than attention")
    dense = keys["leading_dense_block_count"]
    later = {f"blk.{i}.ffn_gate.weight" for i in range(dense, keys["block_count"])}
    if any(tensor.name in later for tensor in result.tensors):
        result.remark("for keelback only: layers without experts follow on some with experts")


def add_layer(
    result: Plan, checkpoint: Checkpoint, i: int, delta: Delta, *, gated: bool = False
) -> None:
    """All tensors of layer i. gated: whether attention has a gate for every head."""
    d_model = result.keys["embedding_length"]
    for hf, gguf in (("input", "attn"), ("post_attention", "ffn")):
        name = f"model.layers.{i}.{hf}_layernorm"
        add_norm(result, checkpoint, name, f"blk.{i}.{gguf}_norm", d_model)
    mixer, attends = _mixer_of(checkpoint, i)
    if attends:
        count = result.keys["attention.head_count"]
        heads = count[i] if isinstance(count, list) else count
        _add_attention(result, checkpoint, mixer, f"blk.{i}", heads)
        if gated:
            gate = f"blk.{i}.attn_gate"
            add_linear(result, checkpoint, f"{mixer}.g_proj", gate, heads, d_model)
    else:
        add_mixer(result, checkpoint, mixer, f"blk.{i}", delta)
    _add_feed_forward(result, checkpoint, i)


def add_mixer(result: Plan, checkpoint: Checkpoint, mixer: str, blk: str, delta: Delta) -> None:
    """Delta attention: three projections and convolutions, decays, strengths and output gate."""
    d_model, d_key = result.keys["embedding_length"], delta.d_key
    d_inner, keys = delta.heads * delta.d_value, delta.key_heads * d_key
    for part, width in (("q", keys), ("k", keys), ("v", d_inner)):
        hf, gguf = f"{mixer}.{part}_proj", f"{blk}.attn_{part}"
        add_linear(result, checkpoint, hf, gguf, width, d_model)
        if delta.taps is not None:
            taps = checkpoint.require(f"{mixer}.{part}_conv1d.weight", width, delta.taps)
            result.add(f"{blk}.ssm_conv1d_{part}.weight", (1, width, 1, delta.taps), taps)
    for gate, width in (("f", delta.heads * d_key), ("g", d_inner)):
        widths = (d_model, width) if len(delta.gates) == 1 else (d_model, delta.d_value, width)
        for end, letter, columns, rows in zip(delta.gates, "ab", widths, widths[1:], strict=False):
            gguf = f"{blk}.ssm_{gate}_{letter}"
            add_linear(result, checkpoint, f"{mixer}.{gate}{end}", gguf, rows, columns)
    add_linear(result, checkpoint, f"{mixer}.b_proj", f"{blk}.ssm_beta", delta.heads, d_model)
    result.add(f"{blk}.ssm_a", delta.shape, _rates(checkpoint, f"{mixer}.A_log", delta))
    steps = delta.heads * d_key
    result.add(f"{blk}.ssm_dt.bias", (steps,), checkpoint.require(f"{mixer}.dt_bias", steps))
    add_norm(result, checkpoint, f"{mixer}.o_norm", f"{blk}.ssm_norm", delta.d_value)
    out = checkpoint.first(f"{mixer}.o_proj", f"{mixer}.dense")
    add_linear(result, checkpoint, out, f"{blk}.attn_output", d_model, d_inner)


def _rates(checkpoint: Checkpoint, name: str, delta: Delta) -> Part:
    """A_log, of which there may be more than heads: the first ones count."""
    a_log = checkpoint.require(name)
    size = int(np.prod(a_log.shape))
    if size < delta.heads:
        a_log = checkpoint.require(name, delta.heads)
    columns = None if size == delta.heads else np.arange(delta.heads)
    return Part(a_log.reshaped(size), columns=columns, function=delta.rate)


def _add_attention(result: Plan, checkpoint: Checkpoint, mixer: str, blk: str, heads: int) -> None:
    """Latent attention, the matrix of keys and values taken apart by head and by use."""
    keys = result.keys
    d_model, latent = keys["embedding_length"], keys["attention.kv_lora_rank"]
    d_head, d_value = keys["attention.key_length_mla"], keys["attention.value_length_mla"]
    turned = keys["rope.dimension_count"]
    plain = d_head - turned

    def linear(hf: str, gguf: str, rows: int, columns: int) -> None:
        add_linear(result, checkpoint, f"{mixer}.{hf}", f"{blk}.{gguf}", rows, columns)

    if (rank := keys.get("attention.q_lora_rank")) is None:
        linear("q_proj", "attn_q", heads * d_head, d_model)
    else:
        linear("q_a_proj", "attn_q_a", rank, d_model)
        add_norm(result, checkpoint, f"{mixer}.q_a_layernorm", f"{blk}.attn_q_a_norm", rank)
        linear("q_b_proj", "attn_q_b", heads * d_head, rank)
    linear("kv_a_proj_with_mqa", "attn_kv_a_mqa", latent + turned, d_model)
    add_norm(result, checkpoint, f"{mixer}.kv_a_layernorm", f"{blk}.attn_kv_a_norm", latent)
    both = checkpoint.require(f"{mixer}.kv_b_proj.weight", heads * (plain + d_value), latent)
    result.add(f"{blk}.attn_k_b.weight", (heads, latent, plain), Transposed(both, heads, plain))
    rows = np.arange(heads * (plain + d_value)).reshape(heads, -1)[:, plain:].reshape(-1)
    result.add(f"{blk}.attn_v_b.weight", (heads, d_value, latent), Part(both, rows=rows))
    out = checkpoint.first(f"{mixer}.o_proj", f"{mixer}.dense").removeprefix(f"{mixer}.")
    linear(out, "attn_output", d_model, heads * d_value)


def _add_feed_forward(result: Plan, checkpoint: Checkpoint, i: int) -> None:
    """An MLP, or a router, its experts and those that all rows go through."""
    keys, blk, layer = result.keys, f"blk.{i}", f"model.layers.{i}"
    d_model, moe = keys["embedding_length"], _router_of(checkpoint, i)
    if moe is None:
        gate = checkpoint.first(f"{layer}.mlp.gate_proj", f"{layer}.block_sparse_moe.gate_proj")
        mlp, width = gate.rpartition(".")[0], keys["feed_forward_length"]
        add_mlp(result, checkpoint, mlp, blk, width, d_model, NAMES)
        return
    experts, width = keys["expert_count"], keys["expert_feed_forward_length"]
    add_linear(result, checkpoint, f"{moe}.gate", f"{blk}.ffn_gate_inp", experts, d_model)
    names = (f"{moe}.gate.e_score_correction_bias", f"{moe}.gate.expert_bias")
    name = next((name for name in names if checkpoint.find(name)), names[0])
    result.add(f"{blk}.exp_probs_b.bias", (experts,), checkpoint.require(name, experts))
    kimi = checkpoint.find(f"{moe}.experts.0.w1.weight") is not None
    spelled = NUMBERED if kimi else NAMES
    add_experts(result, checkpoint, blk, f"{moe}.experts", experts, width, d_model, spelled)
    shared, width = f"{moe}.shared_experts", width * keys["expert_shared_count"]
    add_mlp(result, checkpoint, shared, blk, width, d_model, NAMES, "_shexp")


def positive_exp(a_log: np.ndarray) -> np.ndarray:
    """exp(A_log): of safe gates GGUF holds how fast they go, and not how fast the state decays."""
    return -negative_exp(a_log)


def lower_bound(config: Config, key: str, default: float) -> float:
    """The lower bound of logarithms of decays; InvalidFile where it is no number below zero."""
    bound = config.get(key, default)
    if type(bound) not in (int, float) or not -1e30 < bound < 0:
        raise InvalidFile(f"{config.path}: {key} is {repr(bound)[:80]}, not a number below zero")
    return float(bound)


def _mixer_of(checkpoint: Checkpoint, i: int) -> tuple[str, bool]:
    """What the tensors of a layer's mixer begin with, and whether it is one of attention."""
    names = [f"model.layers.{i}.{name}" for name in ("self_attn", "attention")]
    for name in names:
        if checkpoint.find(f"{name}.kv_a_proj_with_mqa.weight"):
            return name, True
    name = checkpoint.first(*(f"{name}.b_proj" for name in names))
    # A layer that is not there ends it, however many config speaks of.
    checkpoint.require(f"{name}.weight")
    return name.rpartition(".")[0], False


def _router_of(checkpoint: Checkpoint, i: int) -> str | None:
    """What the tensors of a layer's experts begin with, or None where it has none."""
    names = [f"model.layers.{i}.{name}" for name in ("mlp", "block_sparse_moe")]
    return next((name for name in names if checkpoint.find(f"{name}.gate.weight")), None)
