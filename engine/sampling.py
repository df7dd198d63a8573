"""Choosing the next token: a list of small steps over candidates, then one draw.

All of it in float64, ties to the lowest id. Randomness is a function of (seed, position), so that a
fork, a rewind or a batch needs no generator's state.
"""

from __future__ import annotations

import hashlib
import numbers
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..kernels.errors import InvalidInput

#: Seeds are unsigned 64-bit numbers.
SEEDS = 1 << 64

#: The settings that are numbers: kind, smallest, largest.
RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 1e6),
    "top_k": (int, 0, 1 << 31),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "repeat_penalty": (float, 1e-6, 1e6),
    "presence_penalty": (float, -1e6, 1e6),
    "frequency_penalty": (float, -1e6, 1e6),
    "repeat_last_n": (int, 0, 1 << 20),
    "seed": (int, 0, SEEDS - 1),
}
# What those may come as: NumPy's are numbers too.
_ACCEPTED = {float: numbers.Real, int: numbers.Integral}


def within(value: Any, kind: type, low: float, high: float) -> bool:
    """Whether a value is a number of a kind, float or int, from `low` to `high`."""
    number = isinstance(value, _ACCEPTED[kind]) and not isinstance(value, bool)
    return number and bool(low <= value <= high)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; the names are llama.cpp's, and so are the defaults but for the seed.

    That is 0 unless another is given: the same text every time.
    temperature 0 takes the most likely token; top_k 0, top_p 1 and min_p 0 keep all. Penalties look
    at the last `repeat_last_n` tokens. logit_bias is added to logits by id. Raises InvalidInput for
    a value out of its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (kind, low, high) in RANGES.items():
            value = getattr(self, name)
            if not within(value, kind, low, high):
                raise InvalidInput(f"{name} is {value!r}; give a number from {low} to {high}")
            object.__setattr__(self, name, kind(value))
        for token, amount in self.logit_bias.items():
            # Minus infinity bans a token; NaN is no number at all.
            known = isinstance(amount, numbers.Real) and amount < float("inf")
            if not (known and isinstance(token, numbers.Integral)):
                raise InvalidInput(f"logit_bias gives {token!r} {amount!r}; give ids and numbers")
        bias = {int(token): float(amount) for token, amount in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", bias)

    def steps(self) -> list[Step]:
        """The steps in the order in which they are taken."""
        steps: list[Step] = [_bias(self.logit_bias), _penalties(self)]
        if self.temperature == 0:
            return [*steps, _top_k(1)]
        return [
            *steps,
            _top_k(self.top_k),
            _top_p(self.top_p),
            _min_p(self.min_p),
            _tempered(self.temperature),
        ]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens still in play: `ids` int64 and their `logits` float64; sorted from `_top_k` on."""

    ids: np.ndarray
    logits: np.ndarray

    def keep(self, which: np.ndarray) -> Candidates:
        """Those of a mask or of an order."""
        return Candidates(self.ids[which], self.logits[which])

    def probabilities(self) -> np.ndarray:
        """The softmax of the logits, float64."""
        weights = np.exp(self.logits - self.logits.max())
        return weights / weights.sum()


Step = Callable[[Candidates, Sequence[int]], Candidates]


def sample(logits: np.ndarray, recent: Sequence[int], sampling: Sampling, position: int) -> int:
    """Choose the next token.

    logits: float32 (vocabulary,). recent: the last tokens, for the penalties. position: tokens read
    so far, which with the seed fixes the draw.
    """
    candidates = Candidates(np.arange(len(logits)), logits.astype(np.float64))
    for step in sampling.steps():
        candidates = step(candidates, recent)
        if not candidates.logits.max() > -np.inf:
            raise InvalidInput("logit_bias bans every token; leave one to choose")
    cumulative = np.cumsum(candidates.probabilities())
    drawn = uniform(sampling.seed, position) * cumulative[-1]
    index = int(np.searchsorted(cumulative, drawn, side="right"))
    return int(candidates.ids[min(index, len(candidates.ids) - 1)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _bias(bias: Mapping[int, float]) -> Step:
    def step(candidates: Candidates, recent: Sequence[int]) -> Candidates:
        for token, amount in bias.items():
            if not 0 <= token < len(candidates.logits):
                raise InvalidInput(
                    f"logit_bias names the id {token}, which the model does not have"
                )
            candidates.logits[token] += amount
        return candidates

    return step


def _penalties(settings: Sampling) -> Step:
    def step(candidates: Candidates, recent: Sequence[int]) -> Candidates:
        window = list(recent)[-settings.repeat_last_n :] if settings.repeat_last_n else []
        if not window:
            return candidates
        tokens, counts = np.unique(np.array(window), return_counts=True)
        logits = candidates.logits[tokens]
        # Dividing a positive and multiplying a negative logit both make the token less likely.
        penalty = settings.repeat_penalty
        logits = np.where(logits > 0, logits / penalty, logits * penalty)
        logits -= counts * settings.frequency_penalty + settings.presence_penalty
        candidates.logits[tokens] = logits
        return candidates

    return step


def _top_k(k: int) -> Step:
    def step(candidates: Candidates, recent: Sequence[int]) -> Candidates:
        if 0 < k < len(candidates.ids):
            threshold = -np.partition(-candidates.logits, k - 1)[k - 1]
            candidates = candidates.keep(candidates.logits >= threshold)
        order = np.lexsort((candidates.ids, -candidates.logits))
        return candidates.keep(order[: k or None])

    return step


def _top_p(p: float) -> Step:
    def step(candidates: Candidates, recent: Sequence[int]) -> Candidates:
        if p >= 1:
            return candidates
        probabilities = candidates.probabilities()
        before = np.cumsum(probabilities) - probabilities
        before[0] = -1.0
        return candidates.keep(before < p)

    return step


def _min_p(p: float) -> Step:
    def step(candidates: Candidates, recent: Sequence[int]) -> Candidates:
        probabilities = candidates.probabilities()
        return candidates.keep(probabilities >= p * probabilities[0])

    return step


def _tempered(temperature: float) -> Step:
    def step(candidates: Candidates, recent: Sequence[int]) -> Candidates:
        # Differences first: a tiny temperature must not carry the largest logit to infinity.
        with np.errstate(over="ignore"):
            logits = (candidates.logits - candidates.logits[0]) / temperature
        return Candidates(candidates.ids, logits)

    return step


def file_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a model file recommends (`general.sampling.*`), where they make sense."""
    names = {
        "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
        "penalty_repeat": "repeat_penalty", "penalty_last_n": "repeat_last_n",
    }  # fmt: skip
    found = {ours: metadata.get(f"general.sampling.{theirs}") for theirs, ours in names.items()}
    return {name: value for name, value in found.items() if within(value, *RANGES[name])}
