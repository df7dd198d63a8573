"""Rotary positions as the keys `rope.*` of a file describe them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..kernels.errors import InvalidFile, UnsupportedModel
from ..kernels.rotary import halves
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
) -> Value:
    """Turn the first `count` values of every head of x by the positions of the rows.

    pairs: `halves` or `neighbours`. Files may hold factors for each pair, `rope_freqs`. For text,
    the sections of M-RoPE all have the same position, so that they are no sections at all.
    """
    return g.rotary(x, w.rope_freqs.find(), heads=heads, **pairs(count), **speeds(p, count))


def rotate_both(
    g: Graph,
    p: Hyperparameters,
    w: Any,
    q: Value,
    k: Value,
    *,
    heads: int,
    key_heads: int,
    count: int,
) -> tuple[Value, Value]:
    """`rotate` queries and keys, in the pairs (i, i + count / 2) of each head."""
    return (
        rotate(g, p, w, q, heads=heads, count=count, pairs=halves),
        rotate(g, p, w, k, heads=key_heads, count=count, pairs=halves),
    )


def speeds(p: Hyperparameters, count: int) -> dict[str, float]:
    """Attributes of the op `rotary` that say how fast pairs turn.

    Raises UnsupportedModel for a way of scaling that depends on the length of the text: a token
    would then have to be turned anew when others follow.
    """
    base = p.number("rope.freq_base", 10000.0)
    kind = p.text("rope.scaling.type", "linear")
    factor = p.number("rope.scaling.factor", p.number("rope.scale_linear", 1.0))
    try:
        turn = {"ratio": base ** (-2 / count)}
        if kind == "none" or (kind == "linear" and factor == 1):
            return turn
        if kind == "linear":
            return {**turn, "scale": 1 / factor, "low": -1.0, "high": 0.0}
        if kind == "yarn":
            return {**turn, "scale": 1 / factor, **_yarn(p, count, base, factor)}
    except (ArithmeticError, ValueError):
        raise InvalidFile(
            f"{p.path}: {p.architecture}.rope.freq_base, {base:g}, and the keys rope.scaling.* do "
            "not go together; the file is damaged"
        ) from None
    raise UnsupportedModel(
        f"{p.path}: {p.architecture}.rope.scaling.type is {kind!r:.40}; keelback scales rotary "
        "positions linearly or by YaRN"
    )


def _yarn(p: Hyperparameters, count: int, base: float, factor: float) -> dict[str, float]:
    """Which pairs are slowed down, and what is turned is multiplied by (arXiv 2309.00071)."""
    context = p.count("context_length", 1)
    trained = p.count("rope.scaling.original_context_length", context)
    if p.number("rope.scaling.yarn_ext_factor", 1.0) != 1:
        raise UnsupportedModel(
            f"{p.path}: {p.architecture}.rope.scaling.yarn_ext_factor is not 1; keelback runs YaRN "
            "in full"
        )

    def pair_with(turns: float) -> float:
        """The pair that makes so many turns within the context of the training."""
        return count * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    fast = p.number("rope.scaling.yarn_beta_fast", 32.0)
    slow = p.number("rope.scaling.yarn_beta_slow", 1.0)
    usual = 1 + 0.1 * math.log(max(1.0, factor))
    magnitude = p.number("rope.scaling.attn_factor", 1.0) * usual
    return {
        "low": max(0.0, float(math.floor(pair_with(fast)))),
        "high": min(count - 1.0, float(math.ceil(pair_with(slow)))),
        # A file may name the whole of it.
        "magnitude": p.number("rope.scaling.yarn_attn_factor", magnitude),
    }
