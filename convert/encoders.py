"""Float32 rows to the bytes of a tensor type."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..kernels import encoding
from ..kernels.errors import InvalidInput
from ..kernels.formats import blocks
from ..kernels.formats.blocks import BY_NAME, BlockFormat
from ..kernels.objects import Notice, Progress, addresses, callable_kernel

#: Types whose bytes the format's reference defines, as long as all columns weigh the same.
_REFERENCE = frozenset({"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"})

#: Types that a kernel searches for.
_SEARCHED = frozenset(
    {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "IQ4_NL", "IQ4_XS"}
    | {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
)

#: Types that `encode` writes.
WRITABLE = frozenset(BY_NAME[name] for name in _REFERENCE | _SEARCHED)

#: How little a column can matter, as a share of the mean: an importance of 0 is no licence.
_LEAST = np.float32(1e-4)


def prepare(types: Iterable[BlockFormat], notice: Notice, progress: Progress | None = None) -> None:
    """Compile the kernels that encode these types, where the cache lacks them.

    `notice` is told when that takes a while; see `kernels.objects.addresses`.
    """
    names = sorted(block.name for block in set(types) if block.name in _SEARCHED)
    addresses([_kernel(name) for name in names], notice, progress)


def encode(
    values: np.ndarray, block: BlockFormat, importance: np.ndarray | None = None
) -> np.ndarray:
    """Encode rows of weights.

    values: float32 (rows, width), finite, `width` a multiple of the block's elements. importance:
    float32 (width,), how much an error in each column weighs (not negative), or None for columns
    that weigh the same. Returns uint8 (rows, row bytes). Threads may call it at the same time.

    Raises InvalidInput for a type that cannot be written.
    """
    if block not in WRITABLE:
        raise InvalidInput(f"nothing here writes the type {block.name}; choose another type")
    if block.name in _REFERENCE and (importance is None or block.name not in _SEARCHED):
        return blocks.quantize(values, block).view(np.uint8).reshape(len(values), -1)
    values = np.ascontiguousarray(values, np.float32)
    rows, width = values.shape
    encoded = np.empty((rows, block.row_bytes(width)), np.uint8)
    weights = None if importance is None else _weights(importance)
    record = np.zeros(encoding.FIELDS, np.int64)
    record[encoding.SOURCE] = values.ctypes.data
    record[encoding.TARGET] = encoded.ctypes.data
    record[encoding.BLOCKS] = values.size // block.elements
    record[encoding.BLOCKS_EACH] = width // block.elements
    record[encoding.IMPORTANCE] = 0 if weights is None else weights.ctypes.data
    kernel = _kernel(block.name)
    run = callable_kernel(addresses([kernel], lambda text: None)[kernel[0]])
    run(record.ctypes.data, 0, 0, 1)
    return encoded


def _kernel(name: str) -> tuple[str, str]:
    """Name and module of the kernel that searches for a type."""
    return f"encode.{name.lower()}", "keelback.kernels.encode_cpu"


def _weights(importance: np.ndarray) -> np.ndarray | None:
    """Importance relative to its mean, all of it above 0; None where none is known."""
    mean = float(importance.mean(dtype=np.float64))
    if not mean > 0:
        return None
    return np.maximum(importance / np.float32(mean), _LEAST).astype(np.float32)
