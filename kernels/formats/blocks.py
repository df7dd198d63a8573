"""GGML's tensor types: how many elements a block holds, in how many bytes, and what they mean.

Source: the GGUF specification and ggml's block layouts. Types that no kernel reads as they are get
widened through the reference dequantization of the `gguf` package.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A tensor type: `elements` consecutive values of a row are stored in `nbytes` bytes."""

    name: str
    code: int
    elements: int
    nbytes: int

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` elements; `width` is a multiple of `elements`."""
        return width // self.elements * self.nbytes


_TABLE = [
    ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 36),
    ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292), ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136), ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4),
    ("I64", 27, 1, 8), ("F64", 28, 1, 8), ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2),
    ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36),
    ("Q1_0", 41, 128, 18), ("Q2_0", 42, 64, 18),
]  # fmt: skip

BY_CODE = {
    code: BlockFormat(name, code, elements, nbytes) for name, code, elements, nbytes in _TABLE
}
BY_NAME = {block.name: block for block in BY_CODE.values()}
F32, F16, BF16, Q8_0 = (BY_NAME[name] for name in ("F32", "F16", "BF16", "Q8_0"))

#: What the codes of IQ4_NL and IQ4_XS stand for, and those of MXFP4, twice as much.
UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FLOATS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

#: Types of whole numbers, which meet activations that are rounded to whole numbers too.
QUANTIZED = frozenset(
    BY_NAME[name]
    for name in (
        "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4",
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS",
    )
)  # fmt: skip

#: Types that kernels compute with as they are; others are widened.
NATIVE = frozenset({F32, F16, BF16}) | QUANTIZED


def dequantize(data: np.ndarray, block: BlockFormat, shape: tuple[int, ...]) -> np.ndarray:
    """Decode raw blocks into float32.

    data: uint8, the bytes of the tensor, rows one after another. Returns float32 of `shape`
    (slowest dimension first). Raises UnsupportedModel for a type that is not `readable`.
    """
    # Scales of a damaged file may be infinite: that shows in the logits, not here.
    with np.errstate(all="ignore"):
        return _decoded(data, block, shape).reshape(shape)


def _decoded(data: np.ndarray, block: BlockFormat, shape: tuple[int, ...]) -> np.ndarray:
    if block is F32:
        return data.view(np.float32)
    if block is F16:
        return data.view(np.float16).astype(np.float32)
    if block is BF16:
        return bf16_to_f32(data.view(np.uint16))
    if block.name == "F64":
        return data.view(np.float64).astype(np.float32)
    if block is Q8_0:
        blocks = data.reshape(-1, block.nbytes)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        return scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    quants, kinds = _reference()
    try:
        rows = data.reshape(-1, block.row_bytes(shape[-1]))
        return quants.dequantize(rows, kinds(block.code)).astype(np.float32)
    except (NotImplementedError, ValueError, KeyError):
        raise UnsupportedModel(
            f"the type {block.name} has no decoder; convert the model to F16 or Q8_0"
        ) from None


@cache
def readable(block: BlockFormat) -> bool:
    """Whether weights can have a type: not whole numbers, nor types made for activations."""
    if block in NATIVE:
        return True
    try:
        dequantize(np.zeros(block.nbytes, np.uint8), block, (1, block.elements))
    except UnsupportedModel:
        return False
    return True


def quantize(values: np.ndarray, block: BlockFormat) -> np.ndarray:
    """Encode float32 rows (slowest dimension first) as F32, F16, BF16 or Q8_0.

    Returns uint8 with the last dimension counted in bytes. Rows must divide into whole blocks.
    """
    values = np.ascontiguousarray(values, np.float32)
    if block is F32:
        return values.view(np.uint8)
    if block is F16:
        return values.astype(np.float16).view(np.uint8)
    if block is Q8_0:
        return _to_q8_0(values.reshape(-1, 32)).reshape(*values.shape[:-1], -1)
    quants, kinds = _reference()
    return np.ascontiguousarray(quants.quantize(values, kinds(block.code))).view(np.uint8)


def _to_q8_0(values: np.ndarray) -> np.ndarray:
    """Blocks of 32 numbers as a float16 scale and whole numbers to 127, as ggml rounds them."""
    magnitude = np.abs(values)
    scale = np.maximum.reduceat(magnitude.reshape(-1), np.arange(0, values.size, 32))
    scale /= np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    inverse[np.isinf(inverse)] = 0
    scaled = values * inverse[:, None]
    whole = np.rint(scaled, out=magnitude)
    # NumPy rounds halves to even numbers and ggml away from zero; there are hardly any. All in
    # place: fresh memory costs more than the arithmetic.
    scaled -= whole
    halves = np.abs(scaled, out=scaled) == 0.5
    if halves.any():
        exact = (values * inverse[:, None])[halves]
        whole[halves] = np.trunc(exact) + np.sign(exact)
    encoded = np.empty((len(values), 34), np.uint8)
    encoded[:, :2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    encoded[:, 2:] = whole.astype(np.int8).view(np.uint8)
    return encoded


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bit patterns (uint16) to float32 of the same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@cache
def _reference():
    """The `gguf` package's reference quantization, imported when it is first needed."""
    from gguf import GGMLQuantizationType, quants

    return quants, GGMLQuantizationType
