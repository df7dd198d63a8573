"""Float32 rows to the bytes of a tensor type."""

from __future__ import annotations

import numpy as np

from ..kernels.errors import InvalidInput
from ..kernels.formats import blocks
from ..kernels.formats.blocks import BlockFormat

#: Types whose bytes the format's reference defines.
_REFERENCE = frozenset({"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"})


def encode(
    values: np.ndarray, block: BlockFormat, importance: np.ndarray | None = None
) -> np.ndarray:
    """Encode rows of weights.

    values: float32 (rows, width), finite, `width` a multiple of the block's elements. importance:
    float32 (width,), how much an error in each column weighs (not negative), or None for columns
    that weigh the same. Returns uint8 (rows, row bytes). Threads may call it at the same time.

    Raises InvalidInput for a type that cannot be written.
    """
    if block.name not in _REFERENCE:
        raise InvalidInput(f"nothing here writes the type {block.name}; choose another type")
    return blocks.quantize(values, block).view(np.uint8).reshape(len(values), -1)
