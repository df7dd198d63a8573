"""Finds what is not finite in tensors as they are stored, without decoding them.

Source: ggml's block layouts. The values of a block are whole numbers times its scales, so only the
scales can be NaN or infinite; of types without a block every value can.
"""

from __future__ import annotations

import numpy as np

from .blocks import BlockFormat

#: Unsigned type with a float's bits, and those bits of it that are all set where it is not finite.
_F16, _BF16 = ("<u2", 0x7C00), ("<u2", 0x7F80)
_F32, _F64 = ("<u4", 0x7F800000), ("<u8", 0x7FF0000000000000)
# A scale of MXFP4 is an exponent alone, and the largest stands for NaN.
_E8M0 = ("u1", 0xFF)

#: By type: the floats of a block, and at which of its bytes they begin. What is not named has none.
_FLOATS: dict[str, tuple[tuple[str, int], tuple[int, ...]]] = {
    "F32": (_F32, (0,)), "F16": (_F16, (0,)), "BF16": (_BF16, (0,)), "F64": (_F64, (0,)),
    "Q4_0": (_F16, (0,)), "Q4_1": (_F16, (0, 2)), "Q5_0": (_F16, (0,)), "Q5_1": (_F16, (0, 2)),
    "Q8_0": (_F16, (0,)), "Q8_1": (_F16, (0, 2)), "Q2_K": (_F16, (80, 82)),
    "Q3_K": (_F16, (108,)), "Q4_K": (_F16, (0, 2)), "Q5_K": (_F16, (0, 2)), "Q6_K": (_F16, (208,)),
    "Q8_K": (_F32, (0,)), "IQ2_XXS": (_F16, (0,)), "IQ2_XS": (_F16, (0,)), "IQ2_S": (_F16, (0,)),
    "IQ3_XXS": (_F16, (0,)), "IQ3_S": (_F16, (0,)), "IQ1_S": (_F16, (0,)), "IQ4_NL": (_F16, (0,)),
    "IQ4_XS": (_F16, (0,)), "TQ1_0": (_F16, (52,)), "TQ2_0": (_F16, (64,)), "MXFP4": (_E8M0, (0,)),
    "Q1_0": (_F16, (0,)), "Q2_0": (_F16, (0,)),
}  # fmt: skip


def not_finite(data: memoryview, block: BlockFormat) -> tuple[int, int]:
    """How many floats of some whole blocks, values or scales, are NaN, and how many infinite."""
    count = len(data) // block.nbytes
    if block.name == "IQ1_M":
        return _count(_scales_of_iq1_m(data, count), 0x7C00)
    if block.name not in _FLOATS:
        return 0, 0
    (dtype, exponent), places = _FLOATS[block.name]
    found = [
        _count(np.ndarray(count, dtype, data, place, (block.nbytes,)), exponent) for place in places
    ]
    return sum(nan for nan, _ in found), sum(infinite for _, infinite in found)


def _count(bits: np.ndarray, exponent: int) -> tuple[int, int]:
    mask = bits.dtype.type(exponent)
    special = (bits & mask) == mask
    if not special.any():
        return 0, 0
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    infinite = int((bits[special] & ~sign == mask).sum()) if exponent != 0xFF else 0
    return int(special.sum()) - infinite, infinite


def _scales_of_iq1_m(data: memoryview, count: int) -> np.ndarray:
    """The bits of a block's one scale, four of them in each of its last four numbers."""
    last = np.ndarray((count, 4), "<u2", data, 48, (56, 2)) & np.uint16(0xF000)
    return last[:, 0] >> 12 | last[:, 1] >> 8 | last[:, 2] >> 4 | last[:, 3]
