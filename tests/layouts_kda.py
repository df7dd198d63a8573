"""Kimi Linear and Ling 3.0 in the layouts that their checkpoints are found in."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tiny_files import raw, read
from tiny_layouts import Config, Layout, Tensors, named

_EXPERT = re.compile(r"\.experts\.(\d+)\.(\w+)\.weight$")


def _stacked(gate: str, up: str, down: str) -> Callable[[Tensors], Tensors]:
    """Experts as transformers has them in memory: a stack, in which gate lies above up."""

    def tensors(theirs: Tensors) -> Tensors:
        found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
        for name, tensor in theirs.items():
            if match := _EXPERT.search(name):
                parts = found.setdefault(name[: match.start()], {})
                parts.setdefault(match[2], {})[int(match[1])] = read(tensor)
        kept = {name: tensor for name, tensor in theirs.items() if not _EXPERT.search(name)}
        for at, parts in found.items():
            stacks = {
                name: np.stack([parts[name][e] for e in sorted(parts[name])])
                for name in (gate, up, down)
            }
            both = np.concatenate([stacks[gate], stacks[up]], axis=1)
            kept[f"{at}.experts.gate_up_proj"] = raw(both)
            kept[f"{at}.experts.down_proj"] = raw(stacks[down])
        return kept

    return tensors


def _shaped(end: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], Tensors]:
    return lambda theirs: {
        name: raw(change(read(tensor))) if name.endswith(end) else tensor
        for name, tensor in theirs.items()
    }


def _more_than_heads(a_log: np.ndarray) -> np.ndarray:
    return np.concatenate([a_log.reshape(-1), np.full(5, 7, np.float32)])


def _with(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda theirs: theirs | {name: raw(np.ones((3, 5), np.float32)) for name in names}


def _saved_kimi(theirs: Config) -> Config:
    """transformers 5: other names, and what layers are, one by one."""
    inner = theirs["linear_attn_config"]
    full = inner["full_attn_layers"]
    kinds = [
        "full_attention" if i + 1 in full else "linear_attention"
        for i in range(theirs["num_hidden_layers"])
    ]
    sizes = {
        "linear_num_heads": inner["num_heads"],
        "linear_head_dim": inner["head_dim"],
        "linear_conv_kernel_dim": inner["short_conv_kernel_size"],
    }
    rest = {key: value for key, value in theirs.items() if key != "linear_attn_config"}
    return rest | sizes | {"layer_types": kinds}


_ALIASES = {
    "model_max_length": "max_position_embeddings", "moe_renormalize": "norm_topk_prob",
    "num_experts": "num_local_experts", "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts", "num_expert_group": "n_group",
}  # fmt: skip


def _aliases(theirs: Config) -> Config:
    return {_ALIASES.get(key, key): value for key, value in theirs.items()}


def _saved_ling(theirs: Config) -> Config:
    """transformers 5: the authors' names for some keys, and another meaning of head_dim."""
    back = {ours: name for name, ours in _ALIASES.items()}
    config = {back.get(key, key): value for key, value in theirs.items()}
    del config["partial_rotary_factor"], config["rope_theta"]
    return config | {
        "linear_head_dim": theirs["head_dim"],
        "linear_num_heads": theirs["num_attention_heads"],
        "head_dim": theirs["qk_rope_head_dim"],
        "rope_parameters": {"rope_type": "default", "rope_theta": theirs["rope_theta"]},
    }


def _pictures(theirs: Config) -> Config:
    outer = {"model_type": "some_vl", "vision_config": {"hidden_size": 7}}
    return outer | {"text_config": theirs}


def _below_pictures(theirs: Tensors) -> Tensors:
    inner = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in theirs.items()
    }
    return inner | {"model.visual.blocks.0.attn.qkv.weight": raw(np.ones((3, 5), np.float32))}


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1)


def _squeezed(values: np.ndarray) -> np.ndarray:
    return values[:, 0]


_MLPS = ("block_sparse_moe", "mlp")
_LONG_NAMES = ((".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."))
_OTHER_NAMES = (
    (".attention.", ".self_attn."), (".dense.", ".o_proj."), ("word_embeddings", "embed_tokens"),
    ("expert_bias", "e_score_correction_bias"),
)  # fmt: skip
_MTP = ("model.layers.4.eh_proj.weight", "model.layers.4.attention.q_proj.weight")

LAYOUTS: dict[str, Layout] = {
    "kimi, saved by transformers 5": Layout(
        "kimi-hub", _saved_kimi, named(("layers.0.mlp", "layers.0.block_sparse_moe"))
    ),
    "kimi, aliases of transformers": Layout("kimi-hub", _aliases),
    "kimi, experts with long names": Layout("kimi-hub", dict, named(_MLPS, *_LONG_NAMES)),
    "kimi, experts in stacks": Layout("kimi-hub", dict, _stacked("w1", "w3", "w2")),
    "kimi, A_log flat": Layout("kimi-hub", dict, _shaped("A_log", _flat)),
    "kimi, A_log longer": Layout("kimi-hub", dict, _shaped("A_log", _more_than_heads)),
    "kimi, convolutions flat": Layout("kimi-hub", dict, _shaped("conv1d.weight", _squeezed)),
    "ling, saved by transformers 5": Layout("ling-hub", _saved_ling),
    "ling, names of transformers": Layout("ling-hub", dict, named(*_OTHER_NAMES)),
    "ling, experts in stacks": Layout(
        "ling-hub", dict, _stacked("gate_proj", "up_proj", "down_proj")
    ),
    "ling, layers that guess further": Layout(
        "ling-hub", lambda theirs: theirs | {"num_nextn_predict_layers": 1}, _with(*_MTP)
    ),
    "ling, one that sees": Layout("ling-hub", _pictures, _below_pictures),
}
