"""Blocks of 32 floats as signed bytes and a scale: activations, and keys and values in Q8_0."""

from __future__ import annotations

import numpy as np

BLOCK = 32


def round_blocks(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round to whole multiples, to the nearest, ties to even, of a block's largest magnitude / 127.

    x: (..., K) float32, K a multiple of 32. Returns (..., K / 32, 32) int8 and what they are
    multiples of, (..., K / 32) float32.
    """
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    largest = np.abs(blocks).max(axis=-1)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(blocks * inverse[..., None]).astype(np.int8), largest * np.float32(1 / 127)
