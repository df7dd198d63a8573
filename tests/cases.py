"""Cases of kernels: `kernel_cases.py` and `weight_cases.py` register them for test_kernels.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness import Case
from keelback.kernels.op import catalogue

SIZES = (1, 3, 17, 31, 33, 63, 65, 257)
LENGTHS = (5, 1, 11, 2)
T = sum(LENGTHS)

CASES: dict[str, Case] = {}


def normal(seed: Any, *shape: int) -> np.ndarray:
    """Seeded float32 of about unit size."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def uniform(seed: Any, low: float, high: float, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def case(name: str, op: str, **parts: Any) -> None:
    """Register a case, LENGTHS long unless it says otherwise."""
    assert name not in CASES
    CASES[name] = Case(catalogue()[op], **{"lengths": LENGTHS, **parts})


def routes(seed: int, rows: int, experts: int, used: int) -> np.ndarray:
    """Different experts for every row, and their strengths; the first is everyone's favourite."""
    liked = normal((seed, 49), rows, experts)
    liked[:, 0] += 2
    chosen = np.argsort(-liked, axis=1)[:, :used]
    return np.concatenate([chosen, uniform(seed, 0, 1, rows, used)], axis=1).astype(np.float32)
