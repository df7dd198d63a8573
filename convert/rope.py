"""Rotary positions: what releases of transformers say of them, as keys of a GGUF file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile, UnsupportedModel
from .config import Config

#: YaRN's parameters: transformers' name, GGUF's.
_YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}


def rope_of(config: Config) -> Config:
    """`rope_parameters`, with what transformers 4 keeps beside them in the config itself.

    Raises InvalidFile where they are no object.
    """
    rope = config.get("rope_parameters", {})
    if not isinstance(rope, dict):
        raise InvalidFile(f"{config.path}: {config.name('rope_parameters')} is no object")
    outer = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    inner = {key: value for key, value in rope.items() if value is not None}
    return Config(config.path, {**outer, **inner})


def rope_keys(config: Config, d_head: int, theta: float, part: float = 1.0) -> dict[str, Any]:
    """Keys for heads of `d_head` values; theta, part: what a silent config stands for.

    Raises UnsupportedModel for a scaling that keelback cannot run, InvalidFile for odd numbers.
    """
    rope = rope_of(config)
    count = int(d_head * rope.number("partial_rotary_factor", part))
    if count % 2 or not 0 < count <= d_head:
        raise InvalidFile(
            f"{config.path}: partial_rotary_factor turns {count} values of {d_head}, not an even "
            "number of them"
        )
    return {"rope.dimension_count": count, **speed_keys(config, theta)}


def speed_keys(config: Config, theta: float) -> dict[str, Any]:
    """`rope_keys` without the number of values that are turned: how fast they turn.

    Raises as that does.
    """
    rope = rope_of(config)
    base = rope.number("rope_theta", theta)
    if base <= 1:
        raise InvalidFile(f"{config.path}: rope_theta is {base:g}, not a number above 1")
    return {"rope.freq_base": base, **_scaling(config, rope)}


def _scaling(config: Config, rope: Config) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "mrope"):
        return {}
    if kind not in ("linear", "yarn"):
        raise UnsupportedModel(
            f"{config.path}: rope_type is {str(kind)[:40]!r}; keelback runs rotary positions "
            "without scaling, linear and yarn"
        )
    factor = rope.number("factor")
    keys: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "linear":
        return keys
    if rope.get("mscale_all_dim"):
        raise UnsupportedModel(
            f"{config.path}: rope_parameters name mscale_all_dim, which changes the scores of "
            "attention too; keelback runs YaRN without it"
        )
    if rope.get("attention_factor") is not None:
        # GGUF holds it over what it usually is.
        usual = 1 + 0.1 * math.log(max(1.0, factor))
        keys["rope.scaling.attn_factor"] = rope.number("attention_factor") / usual
    if rope.get("truncate", True) is not True:
        raise UnsupportedModel(f"{config.path}: truncate is not true; keelback runs YaRN with it")
    trained = rope.get("original_max_position_embeddings")
    keys["rope.scaling.original_context_length"] = (
        config.count("max_position_embeddings")
        if trained is None
        else rope.count("original_max_position_embeddings")
    )
    return keys | {
        f"rope.scaling.{ours}": rope.number(theirs)
        for theirs, ours in _YARN.items()
        if rope.get(theirs) is not None
    }


def side_by_side(heads: int, d_head: int, turned: int) -> np.ndarray:
    """Rows of queries or keys, so that rotary pairs (i, i + turned / 2) become (2 i, 2 i + 1).

    As llama.cpp does it; where nothing is turned it changes no product of a query and a key.
    """
    half = turned // 2
    order = np.arange(d_head)
    order[: 2 * half] = order[: 2 * half].reshape(2, half).T.reshape(-1)
    return (d_head * np.arange(heads)[:, None] + order).reshape(-1)
