"""Rotary positions as the keys `rope.*` of a file describe them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..kernels.errors import UnsupportedModel
from .graph import Graph, Value
from .hyperparameters import Hyperparameters


def rotate(
    g: Graph,
    p: Hyperparameters,
    w: Any,
    x: Value,
    *,
    heads: int,
    count: int,
    pairs: Callable[[int], dict[str, int]],
    first: int = 0,
) -> Value:
    """Turn `count` values of every head of x, from `first` on, by the positions of the rows.

    pairs: `halves` or `neighbours`. Files may hold factors for each pair, `rope_freqs`. For text,
    the sections of M-RoPE all have the same position, so that they are no sections at all.
    """
    return g.rotary(
        x, w.rope_freqs.find(), heads=heads, first=first, **pairs(count), **speeds(p, count)
    )


def speeds(p: Hyperparameters, count: int) -> dict[str, float]:
    """Attributes of the op `rotary` that say how fast pairs turn.

    Raises UnsupportedModel for a way of scaling that depends on the length of the text: a token
    would then have to be turned anew when others follow.
    """
    base = p.number("rope.freq_base", 10000.0)
    turn = {"ratio": base ** (-2 / count)}
    kind = p.text("rope.scaling.type", "none")
    if kind == "none":
        return turn
    factor = p.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {**turn, "scale": 1 / factor, "low": -1.0, "high": 0.0}
    if kind != "yarn":
        raise UnsupportedModel(
            f"{p.path}: {p.architecture}.rope.scaling.type is {kind!r:.40}; keelback scales rotary "
            "positions linearly or by YaRN"
        )
    trained = p.count("rope.scaling.original_context_length")

    def pair_with(turns: float) -> float:
        """The pair that makes so many turns within the context of the training."""
        return count * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    fast = p.number("rope.scaling.yarn_beta_fast", 32.0)
    slow = p.number("rope.scaling.yarn_beta_slow", 1.0)
    return {
        **turn,
        "scale": 1 / factor,
        "low": max(0.0, float(math.floor(pair_with(fast)))),
        "high": min(count - 1.0, float(math.ceil(pair_with(slow)))),
        "magnitude": p.number("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(factor)),
    }
