"""Rows of logits: how far they are from wanted ones, and what they say of tokens."""

from __future__ import annotations

import numpy as np


def row_errors(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """L2 distance of each row relative to the wanted one: (n, width) twice -> (n,), in float64.

    NaN counts as infinite.
    """
    assert got.shape == want.shape, (got.shape, want.shape)
    errors = np.linalg.norm(got.astype(np.float64) - want, axis=1) / np.linalg.norm(want, axis=1)
    return np.where(np.isnan(errors), np.inf, errors)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64, along the last axis."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
