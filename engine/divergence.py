"""How far a model's expectations are from those of another one: what llama.cpp's --kl-divergence
tells (tools/perplexity), over the same tokens, in the same definitions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .perplexity import compare, estimate, normaliser, perplexity_of

#: Log-probabilities below which the base's are not exact, and count for nothing.
_DEEPEST = -16
_PERCENTILES = (99.9, 99, 95, 90, 10, 5, 1, 0.1)


def diverge(logits: np.ndarray, base: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """What rows of logits and a base's log-probabilities, both (R, vocabulary) float32, come to.

    targets: (R,), the tokens that came. Returns (4, R) float64: their negative log-likelihoods
    under the model and under the base, the Kullback-Leibler divergence from the base's expectations
    to the model's, all in nats, and 1 where both hold the same token for the likeliest.
    """
    found = np.empty((4, len(targets)))
    for i, (row, expected, target) in enumerate(zip(logits, base, targets, strict=True)):
        total = normaliser(row)
        found[0, i], found[1, i] = total - float(row[target]), -float(expected[target])
        found[2, i] = _divergence(row, total, expected)
        found[3, i] = row.argmax() == expected.argmax()
    return found


def summary(values: np.ndarray) -> dict[str, Any]:
    """All figures of what `diverge` returned, (4, n), ready for JSON."""
    nll, base, kl, same = values
    ours, theirs, apart = estimate(nll), estimate(base), estimate(nll - base)
    paired, diverged = compare(nll, base), estimate(kl)
    ratio, spread = perplexity_of(apart.mean), nll.std() * base.std()
    return {
        "kl": {"mean": diverged.mean, "error": diverged.error, **_spread(kl)},
        "delta_p": _shifts(np.exp(-nll) - np.exp(-base)),
        "same_top": {"share": float(same.mean()), "error": estimate(same).error},
        "base_ppl": theirs.ppl,
        "base_ppl_error": theirs.ppl_error,
        "ppl_ratio": ratio,
        "ppl_ratio_error": ratio * apart.error,
        "ppl_difference": ours.ppl - theirs.ppl,
        "nll_difference": apart.mean,
        "nll_difference_error": apart.error,
        "correlation": float(np.cov(nll, base, ddof=0)[0, 1] / spread) if spread else None,
        "paired": {"mean": paired.mean, "error": paired.error, "blocks": paired.blocks},
    }


def _divergence(logits: np.ndarray, total: float, expected: np.ndarray) -> float:
    """sum p (log p - log q) over a vocabulary, log q being logits less their total.

    In float64: two close models differ in the last bits of a float32.
    """
    weights = np.exp(expected)
    weights[expected <= _DEEPEST] = 0
    apart = expected.astype(np.float64)
    apart -= logits
    apart += total
    return float(np.dot(weights, apart))


def _shifts(shifts: np.ndarray) -> dict[str, float]:
    """Of the probabilities of the tokens that came."""
    mean, squares = estimate(shifts), estimate(shifts**2)
    rms = math.sqrt(squares.mean)
    return {
        "mean": mean.mean,
        "error": mean.error,
        "rms": rms,
        "rms_error": squares.error / (2 * rms) if rms else 0.0,
        **_spread(shifts),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "maximum": float(values.max()),
        **{f"p{percent}": float(np.percentile(values, percent)) for percent in _PERCENTILES},
        "median": float(np.median(values)),
        "minimum": float(values.min()),
    }
