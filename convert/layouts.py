"""The layouts in which checkpoints of one model are found, brought to the one of transformers.

Sources: mamba_ssm (MambaConfig, Mamba, Mamba2), mistral_inference (params.json), the mamba and
mamba2 of flash-linear-attention, and the releases 4 and 5 of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidFile, UnsupportedModel
from .architectures import module_of, modules
from .config import Config, demand, read_json
from .location import no_config
from .refusals import FILES as REFUSED_BY
from .refusals import float8_block, refuse_adapter

#: The files that are read to recognise a layout.
FILES = ("config.json", "params.json", *REFUSED_BY)

#: Keys that have had another name in transformers, whatever the architecture; each may have more
#: SPELLINGS of its own.
_SPELLINGS = {"layer_types": "layers_block_type", "rope_parameters": "rope_scaling"}
_MAMBA_SSM = {
    "hidden_size": "d_model", "num_hidden_layers": "n_layer", "expand": "ssm_cfg.expand",
    "state_size": "ssm_cfg.d_state", "conv_kernel": "ssm_cfg.d_conv",
    "time_step_rank": "ssm_cfg.dt_rank", "time_step_limit": "ssm_cfg.dt_limit",
    "head_dim": "ssm_cfg.headdim", "n_groups": "ssm_cfg.ngroups",
    "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
_MISTRAL = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip

#: Options that make another model: the value that keelback runs, which is also the default.
_MAMBA_SSM_FIXED = {
    "rms_norm": True, "ssm_cfg.rmsnorm": True, "ssm_cfg.norm_before_gate": False,
    "ssm_cfg.D_has_hdim": False, "ssm_cfg.d_ssm": None, "attn_cfg.mlp_dim": 0,
    "attn_cfg.rotary_emb_interleaved": False,
}  # fmt: skip
_FLA_FIXED = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False}

#: Where a model of several kinds of input keeps the config of its language model.
_WRAPPED = ("text_config", "llm_config", "language_config")
_OWN_TO_WRAPPERS = {"model_type", "architectures", "tie_word_embeddings"}

#: What the tensors of a language model may begin with, what their names begin with then, and what
#: stands before that here, whatever transformers calls it.
_OUTER = ("model.", "backbone.", "language_model.", "text_model.", "module.", "_orig_mod.")
_INNER = (
    "embeddings", "embed_tokens", "word_embeddings", "layers", "norm_f", "norm", "final_layernorm",
    "embedding_norm",
)  # fmt: skip
_ROOT = "model."
#: Layers that guess several tokens ahead, which no model needs to run: what their tensors begin
#: with, or how many of them stand behind the other layers.
_MTP, _MTP_LAYERS = "mtp", ("num_nextn_predict_layers", "num_mtp_layers")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint is to be read: its config and its tensors by the names of transformers.

    rename: None for a tensor that is no part of the language model. block: rows and columns that
    share a factor in a float8 matrix; None where config speaks of no such matrices.
    """

    config: Config
    rename: Callable[[str], str | None]
    block: tuple[int, int] | None


def recognise(folder: Path) -> Layout:
    """The layout of a checkpoint's folder.

    Raises InvalidFile for a folder without config, UnsupportedModel for adapters, for weights that
    are quantized in a way that cannot be converted, and for options that make another model.
    """
    refuse_adapter(folder)
    path, original = folder / "config.json", folder / "params.json"
    if path.exists():
        config, wrapped = described(path, read_json(path))
    elif original.exists():
        config, wrapped = _mistral(original, read_json(original)), False
    else:
        raise no_config(folder)
    block = float8_block(folder, config.values)
    return Layout(config, partial(_renamed, wrapped, _guessing(config)), block)


def _guessing(config: Config) -> range:
    """Numbers of the layers that guess several tokens ahead, where those are counted on."""
    layers = config.get("num_hidden_layers")
    more = next((config.get(key) for key in _MTP_LAYERS if config.get(key)), 0)
    whole = type(layers) is int and type(more) is int
    return range(layers, layers + more) if whole else range(0)


def described(path: Path, values: dict[str, Any]) -> tuple[Config, bool]:
    """What a config.json says of the language model, and whether that is a part of a larger model.

    path: for messages.
    """
    inner = unwrapped(values)
    config = (_mamba_ssm if _is_mamba_ssm(inner) else _transformers)(path, inner)
    return config, inner is not values


def unwrapped(values: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of the language model, with what stands around that and not in it."""
    inner = next((values[key] for key in _WRAPPED if values.get(key)), None)
    if not isinstance(inner, dict):
        return values
    merged = {key: values[key] for key in values.keys() - _OWN_TO_WRAPPERS} | inner
    if values.get("tie_word_embeddings") is True:
        # Which of the two counts differs from model to model; a head that is there is taken anyway.
        merged["tie_word_embeddings"] = True
    return merged


def _is_mamba_ssm(values: dict[str, Any]) -> bool:
    """Files of transformers may have mamba_ssm's keys beside their own."""
    described = "model_type" in values and "ssm_cfg" not in values
    return "d_model" in values and "hidden_size" not in values and not described


def _transformers(path: Path, values: dict[str, Any]) -> Config:
    """The config of transformers, or of flash-linear-attention, which has classes of its names."""
    values = {**values, "model_type": _model_type(values)}
    spellings = _SPELLINGS | getattr(module_of(values["model_type"]), "SPELLINGS", {})
    names = {
        ours: theirs
        for ours, theirs in spellings.items()
        if values.get(ours) is None and theirs in values
    }
    config = Config(path, values, names)
    if config.get("model_type") == "mamba2" and "fuse_norm" in values:
        values["n_groups"] = config.count("n_groups", 1)
        demand(config, _FLA_FIXED)
        if "rmsnorm" not in values and values["n_groups"] > 1:
            raise UnsupportedModel(
                f"{path}: n_groups is {values['n_groups']}, and flash-linear-attention before 0.5 "
                "normalised all groups as one; keelback runs models whose groups are apart"
            )
    return config


def _model_type(values: dict[str, Any]) -> Any:
    """The config's model_type, or that of the class of the model, where one is known by it."""
    known = values.get("model_type")
    names = values.get("architectures")
    if known is None and isinstance(names, list):
        classes = {
            name: kind for m in modules() for name, kind in getattr(m, "CLASSES", {}).items()
        }
        known = next((classes[name] for name in map(str, names) if name in classes), None)
    return known


def _mamba_ssm(path: Path, values: dict[str, Any]) -> Config:
    """mamba_ssm's config, in which a missing key stands for the default of its layers."""
    for outer in ("ssm_cfg", "attn_cfg"):
        inner = values.get(outer) or {}
        if not isinstance(inner, dict):
            raise InvalidFile(f"{path}: {outer} is no object; download the checkpoint again")
        values = {**values, **{f"{outer}.{key}": value for key, value in inner.items()}}
    config = Config(path, values, _MAMBA_SSM)
    second = config.one_of("ssm_cfg.layer", "Mamba1", "Mamba1", "Mamba2") == "Mamba2"
    demand(config, _MAMBA_SSM_FIXED)
    values["model_type"] = "mamba2" if second else "mamba"
    if second:
        values |= {"ssm_cfg.ngroups": config.count("n_groups", 1), "num_heads": _heads(config)}
    return config


def _mistral(path: Path, values: dict[str, Any]) -> Config:
    """Mistral's config, which leaves most of what mamba_ssm can do at its defaults."""
    config = Config(path, values, _MISTRAL)
    if config.get("model_type") != "mamba":
        raise UnsupportedModel(
            f"{path} describes a transformer; take a recurrent model, or llama.cpp for this one"
        )
    demand(config, {"rms_norm": True})
    values |= {"n_groups": config.count("n_groups", 1), "num_heads": _heads(config)}
    values["model_type"] = "mamba2"
    return config


def _heads(config: Config) -> int:
    """mamba_ssm makes as many heads of head_dim as fit its inner size."""
    inner = config.count("expand", 2) * config.count("hidden_size")
    width = config.count("head_dim", 64)
    if inner % width:
        raise InvalidFile(
            f"{config.path}: an inner size of {inner} cannot be cut into heads of {width}; "
            "download the checkpoint again"
        )
    return inner // width


def _renamed(wrapped: bool, guessing: range, name: str) -> str | None:
    """The name of a tensor by which converters ask for it, or None for one that is left aside."""
    bare = name
    while bare.startswith(_OUTER):
        bare = bare.partition(".")[2]
    first, _, rest = bare.partition(".")
    if first == "embedding":
        first = "embeddings"
    number = rest.partition(".")[0]
    if first == "layers" and number.isdecimal() and int(number[:9]) in guessing:
        return None
    if first in _INNER:
        return f"{_ROOT}{first}.{rest}"
    if first == "lm_head":
        return bare
    return None if wrapped or first == _MTP else name
