"""Float32 rows to the bytes of a tensor type."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..kernels import encoding
from ..kernels.errors import InvalidInput
from ..kernels.formats import blocks
from ..kernels.formats.blocks import BY_NAME, BlockFormat
from ..kernels.objects import Notice, addresses, callable_kernel

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


def prepare(types: Iterable[BlockFormat], notice: Notice) -> None:
    """Compile the kernels that encode these types, where the cache lacks them.

    `notice` is told when that takes a while; see `kernels.objects.addresses`.
    """
    names = sorted(block.name for block in set(types) if block.name in _SEARCHED)
    addresses([_kernel(name) for name in names], notice)


def encode(
    values: np.ndarray, block: BlockFormat, importance: np.ndarray | None = None
) -> np.ndarray:
    """Encode rows of weights.

    values: float32 (rows, width), finite, `width` a multiple of the block's elements. importance:
    float32 (width,), how much an error in each column weighs (not negative), or None for columns
    that weigh the same. Returns uint8 (rows, row bytes). Threads may call it at the same time.

    Types with a reference encoder get its bytes as long as no importance is given (F32, F16, BF16
    and Q8_0 in any case). The others, and those with importance, are searched for by the kernels
    `encode.*`; `prepare` compiles them beforehand.

    Raises InvalidInput for a type that cannot be written, for values that are too large for it, for
    rows that do not divide into its blocks, and for importance that is not of that kind.
    """
    values = np.ascontiguousarray(values, np.float32)
    _check(values, block)
    weights = None if importance is None else _weights(importance, values.shape[1])
    if block.name in _DEFINED and (importance is None or block.name not in _SEARCHED):
        return _reference(values, block)
    rows, width = values.shape
    encoded = np.empty((rows, block.row_bytes(width)), np.uint8)
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


def _check(values: np.ndarray, block: BlockFormat) -> None:
    if block not in WRITABLE:
        raise InvalidInput(f"nothing here writes the type {block.name}; choose another type")
    if values.ndim != 2 or values.shape[1] % block.elements:
        shape = "x".join(map(str, values.shape))
        raise InvalidInput(
            f"{shape} values are no rows of {block.name}, whose blocks hold {block.elements}; "
            "choose F16"
        )
    largest = max(-float(values.min(initial=0)), float(values.max(initial=0)))
    if largest > LIMITS.get(block, largest):
        raise InvalidInput(f"a value of {largest:.3g} is too large for {block.name}; choose BF16")


def _reference(values: np.ndarray, block: BlockFormat) -> np.ndarray:
    """Rows as the format's reference writes them."""
    if block.name == "MXFP4":
        return _to_mxfp4(values.reshape(-1, 32)).reshape(len(values), -1)
    # The inverse of a very small scale is infinite; the scale is 0 then.
    with np.errstate(all="ignore"):
        return blocks.quantize(values, block).view(np.uint8).reshape(len(values), -1)


def _to_mxfp4(values: np.ndarray) -> np.ndarray:
    """Blocks of 32 numbers as a power of two and four bits each: sign, and which of 8 magnitudes.

    The bytes are the reference's, which compares every value with all 16 codes.
    """
    magnitude = np.abs(values)
    peak = magnitude.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        power = np.floor(np.log2(peak)) - 2
    # There, an exponent below what the byte holds wraps around.
    power = np.maximum(power, np.float32(-126))
    # The scale is half of that power, for the magnitudes are doubled, to be whole.
    magnitude = np.ldexp(magnitude, 1 - power.astype(np.int32))
    codes = np.zeros(values.shape, np.uint8)
    for edge in (0.5, 1.5, 2.5, 3.5, 5, 7, 10):
        codes += magnitude > np.float32(edge)
    codes[(values < 0) & (codes > 0)] += 8
    encoded = np.empty((len(values), 17), np.uint8)
    encoded[:, :1] = np.where(peak > 0, power + 127, 0)
    encoded[:, 1:] = codes[:, :16] | codes[:, 16:] << 4
    return encoded


def _kernel(name: str) -> tuple[str, str]:
    """Name and module of the kernel that searches for a type."""
    return f"encode.{name.lower()}", f"{encoding.__package__}.encode_cpu"


def _weights(importance: np.ndarray, width: int) -> np.ndarray | None:
    """Importance relative to its mean, all of it above 0; None where all of it is 0."""
    if importance.shape != (width,) or not (np.isfinite(importance) & (importance >= 0)).all():
        raise InvalidInput(
            f"importance has to be {width} finite numbers from 0 up, one a column; collect it anew"
        )
    mean = float(importance.mean(dtype=np.float64))
    return np.asarray(importance / mean + _DOUBT, np.float32) if mean > 0 else None
