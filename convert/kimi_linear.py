"""Hugging Face `kimi_linear`, as its authors and as transformers save it, to GGUF `kimi-linear`."""

from __future__ import annotations

from ..kernels.errors import InvalidFile
from .checkpoint import Checkpoint
from .config import Config, demand
from .kda_hybrids import AUTHORS_KEYS, Delta, add_layer, model_keys, remark_differences
from .layers import add_ends
from .plan import Plan, negative_exp
from .rope import rope_of

MODEL_TYPES = ("kimi_linear",)
SPELLINGS = AUTHORS_KEYS

#: Sizes of delta attention: transformers' name, and the authors' in an object of their own.
_SIZES = {
    "linear_num_heads": "num_heads", "linear_head_dim": "head_dim",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}  # fmt: skip


def plan(checkpoint: Checkpoint) -> Plan:
    """Names, shapes and transforms of every tensor; see the GGUF conventions of `kimi-linear`."""
    config = checkpoint.config
    config.one_of("moe_router_activation_func", "sigmoid", "sigmoid")
    demand(config, {"mla_use_nope": True, "attention_bias": False})
    heads, d_head, taps = _sizes(config)
    gates, shape = ("_a_proj", "_b_proj"), (1, 1, heads, 1)
    delta = Delta(heads, d_head, heads, d_head, taps, gates, negative_exp, shape)
    keys = model_keys(checkpoint, delta)
    if config.get("rope_theta") is not None:
        # Nothing is turned; llama.cpp's converter writes it all the same.
        keys["rope.freq_base"] = rope_of(config).number("rope_theta")
    if not config.flag("norm_topk_prob", True):
        keys["expert_weights_norm"] = False
    result = Plan("kimi-linear", keys)
    add_ends(result, checkpoint, "model.embed_tokens.weight", "model.norm.weight")
    _remark(result)
    for i in range(keys["block_count"]):
        add_layer(result, checkpoint, i, delta)
    remark_differences(result)
    return result


def _sizes(config: Config) -> list[int]:
    """Heads of delta attention, their size, and the taps of its convolutions."""
    inner = config.get("linear_attn_config", {})
    if not isinstance(inner, dict):
        raise InvalidFile(f"{config.path}: linear_attn_config is no object")
    # Where both are there, transformers believes the object.
    theirs = Config(config.path, inner)
    return [
        theirs.count(key) if inner.get(key) is not None else config.count(ours)
        for ours, key in _SIZES.items()
    ]


def _remark(result: Plan) -> None:
    """What llama.cpp has no place for in this architecture."""
    if "attention.q_lora_rank" in result.keys:
        result.remark("for keelback only: queries come from short rows (attn_q_a, attn_q_b)")
    if "expert_weights_norm" in result.keys:
        result.remark("for keelback only: the strengths of experts do not add up to one")
    if all(tensor.name != "output.weight" for tensor in result.tensors):
        result.remark("for keelback only: the output matrix is the embedding")
