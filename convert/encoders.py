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
_DEFINED = frozenset({"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"})

#: Types that a kernel searches for.
_SEARCHED = frozenset(
    {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "IQ4_NL", "IQ4_XS"}
    | {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
)

#: Types that `encode` writes.
WRITABLE = frozenset(BY_NAME[name] for name in _DEFINED | _SEARCHED)

#: The largest magnitude that every place of a type's block can hold; others hold all of float32.
_LARGEST_HALF = 65504.0
LIMITS = {
    BY_NAME[name]: _LARGEST_HALF * steps
    for name, steps in {
        **{"F16": 1, "Q8_0": 127, "Q4_0": 8, "Q5_0": 16, "Q4_1": 1, "Q5_1": 1},
        **{"IQ4_NL": 113, "IQ4_XS": 31 * 113, "Q2_K": 15, "Q3_K": 31 * 3},
        **{"Q4_K": 63, "Q5_K": 63, "Q6_K": 127 * 31},
    }.items()
} | {BY_NAME["BF16"]: 3.38e38}

#: Added to importance, as a share of its mean. It was measured on some text, which said little of
#: columns that were hardly used there; so the encoded model comes closer to the original on others.
_DOUBT = np.float32(0.1)


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

    Types with a reference encoder get its bytes as long as no importance is given; the others, and
    all of them with importance, are searched for by the kernels `encode.*`, which `prepare` compiles.

    Raises InvalidInput for a type that cannot be written, and for values that are too large for it.
    """
    if block not in WRITABLE:
        raise InvalidInput(f"nothing here writes the type {block.name}; choose another type")
    largest = max(-float(values.min(initial=0)), float(values.max(initial=0)))
    if largest > LIMITS.get(block, largest):
        raise InvalidInput(f"a value of {largest:.3g} is too large for {block.name}; choose BF16")
    if block.name in _DEFINED and (importance is None or block.name not in _SEARCHED):
        return _reference(values, block)
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


def _reference(values: np.ndarray, block: BlockFormat) -> np.ndarray:
    """Rows as the format's reference writes them."""
    if block.name == "MXFP4":
        # Exponents of less than this wrap around there.
        values = np.where(np.abs(values) < 2.0**-120, np.float32(0), values)
    # The inverse of a very small scale is infinite; the scale is 0 then.
    with np.errstate(all="ignore"):
        return blocks.quantize(values, block).view(np.uint8).reshape(len(values), -1)


def _kernel(name: str) -> tuple[str, str]:
    """Name and module of the kernel that searches for a type."""
    return f"encode.{name.lower()}", "keelback.kernels.encode_cpu"


def _weights(importance: np.ndarray) -> np.ndarray | None:
    """Importance relative to its mean, all of it above 0; None where all of it is 0."""
    mean = float(importance.mean(dtype=np.float64))
    if not mean > 0:
        return None
    return np.asarray(importance / mean + _DOUBT, np.float32)
