"""Blocks that are random in every bit but their scales, for types that nothing here encodes."""

from __future__ import annotations

import numpy as np

#: By type: bytes of a block, and at which of them a half stands that makes its values deviate by
#: 0.02 or so. Where there is a minimum it is that of values around zero, if the small scales of a
#: block equal its small minima.
_BLOCKS: dict[str, tuple[int, dict[int, float]]] = {
    "Q2_K": (84, {80: 0.02 / (9 * 1.1), 82: 0.02 * 1.5 / (9 * 1.1)}),
    "Q3_K": (110, {108: 0.02 / (18.5 * 2.3)}),
    "Q4_K": (144, {0: 0.02 / (32 * 4.6), 2: 0.02 * 7.5 / (32 * 4.6)}),
    "Q5_K": (176, {0: 0.02 / (32 * 9.2), 2: 0.02 * 15.5 / (32 * 9.2)}),
    "Q6_K": (210, {208: 0.02 / (72 * 18.5)}),
    "IQ4_NL": (18, {0: 0.02 / 67}),
    "IQ4_XS": (136, {0: 0.02 / (18.5 * 67)}),
}
RANDOM = frozenset(_BLOCKS)


def halves(name: str) -> tuple[int, ...]:
    """Where a block of one of RANDOM has its scales."""
    return tuple(_BLOCKS[name][1])


def random_blocks(random: np.random.Generator, name: str, count: int) -> np.ndarray:
    """Blocks of one of RANDOM whose values have a mean of about zero: uint8 (count, bytes)."""
    nbytes, scales = _BLOCKS[name]
    blocks = random.integers(0, 256, (count, nbytes), np.uint8)
    for at, scale in scales.items():
        blocks[:, at : at + 2] = np.full(1, scale, np.float16).view(np.uint8)
    if name in ("Q4_K", "Q5_K"):
        blocks[:, 8:12] = blocks[:, 4:8]
        blocks[:, 12:16] = (blocks[:, 12:16] & 15) * 17
    elif name == "Q2_K":
        blocks[:, :16] = (blocks[:, :16] & 15) * 17
    elif name == "Q6_K":
        blocks[:, 192:208] = random.integers(16, 128, (count, 16), np.uint8)
    return blocks
