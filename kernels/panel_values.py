"""One row of a panel, decoded to float32, superblock by superblock: what an embedding takes."""

from __future__ import annotations

import numpy as np

from .formats.blocks import FLOATS, UNEVEN
from .formats.panels import LANES, PANELS
from .halves import f16_at
from .intrinsics import f32, i8, i32
from .jit import inline

FLOAT, VECTOR = 4, 4 * LANES
F = np.float32


@inline
def byte(weights, vector, i):
    """Byte i of a group of 4, as an unsigned number."""
    return i8(weights + VECTOR * vector)[i] & 255


# ---- weights of a block of 32 columns: (the row's first byte of the block, group, which of 4)


@inline
def nibble(weights, group, i):
    return byte(weights, group % 4, i) >> group // 4 * 4 & 15


@inline
def five(weights, group, i):
    return nibble(weights, group, i) | (byte(weights, 4, i) >> group & 1) << 4


@inline
def three(weights, group, i):
    if group < 6:
        return byte(weights, group // 2, i) >> (3 - group % 2 * 3) & 7
    return byte(weights, group - 6, i) >> 5 & 6 | byte(weights, 2, i) >> group & 1


@inline
def two(weights, group, i):
    return byte(weights, group // 4, i) >> group % 4 * 2 & 3


# ---- formats of 32 columns


@inline
def q8_0(panel, lane, values):
    scale, weights = f16_at(panel + 2 * lane), panel + 2 * LANES + 4 * lane
    for group in range(8):
        for i in range(4):
            f32(values)[4 * group + i] = scale * F(byte(weights, group, i) - 128)


def _one_scale(weight, zero):
    @inline
    def decode(panel, lane, values):
        scale, weights = f16_at(panel + 2 * lane), panel + 2 * LANES + 4 * lane
        for group in range(8):
            for i in range(4):
                f32(values)[4 * group + i] = scale * F(weight(weights, group, i) - zero)

    return decode


def _shifted(weight):
    @inline
    def decode(panel, lane, values):
        scale, least = f16_at(panel + 2 * lane), f16_at(panel + 2 * LANES + 2 * lane)
        weights = panel + 4 * LANES + 4 * lane
        for group in range(8):
            for i in range(4):
                f32(values)[4 * group + i] = scale * F(weight(weights, group, i)) + least

    return decode


@inline
def iq4_nl(panel, lane, values):
    scale, weights = f16_at(panel + 2 * lane), panel + 2 * LANES + 4 * lane
    for group in range(8):
        for i in range(4):
            f32(values)[4 * group + i] = scale * F(UNEVEN[nibble(weights, group, i)])


@inline
def mxfp4(panel, lane, values):
    weights = panel + LANES + 4 * lane
    # The bits of a power of two are its exponent; see `load_powers`.
    i32(values)[0] = max((i8(panel + lane)[0] & 255) - 1, 0) << 23
    scale = f32(values)[0]
    for group in range(8):
        for i in range(4):
            f32(values)[4 * group + i] = scale * F(FLOATS[nibble(weights, group, i)])


# ---- formats of 256 columns


@inline
def paired_nibble(weights, part, group, i):
    return byte(weights, part // 2 * 8 + group, i) >> part % 2 * 4 & 15


@inline
def five_of_part(weights, part, group, i):
    return five(weights + 5 * VECTOR * part, group, i)


def _lowered(weight):
    @inline
    def decode(panel, lane, values):
        d, dmin = f16_at(panel + 2 * lane), f16_at(panel + 2 * LANES + 2 * lane)
        scales, weights = i8(panel + 4 * LANES + lane), panel + 20 * LANES + 4 * lane
        for part in range(8):
            scale, least = d * F(scales[2 * part * LANES]), dmin * F(scales[(2 * part + 1) * LANES])
            for group in range(8):
                for i in range(4):
                    q = weight(weights, part, group, i)
                    f32(values)[32 * part + 4 * group + i] = scale * F(q) - least

    return decode


@inline
def q6_k(panel, lane, values):
    d, scales = f16_at(panel + 2 * lane), i8(panel + 2 * LANES + lane)
    for group in range(64):
        # 128 columns are 4 blocks of 32; the last one's bits stand above those of the others.
        chunk, block, column = group // 32, group // 8 % 4, group % 8
        weights = panel + 20 * LANES + 4 * lane + VECTOR * 3 * (8 * chunk + column)
        scale = d * F(scales[group // 4 * LANES])
        for i in range(4):
            if block < 3:
                q = byte(weights, block, i) & 63
            else:
                low, mid, top = byte(weights, 0, i), byte(weights, 1, i), byte(weights, 2, i)
                q = low >> 6 | mid >> 4 & 12 | top >> 2 & 48
            f32(values)[4 * group + i] = scale * F(q - 32)


@inline
def q3_k(panel, lane, values):
    d, scales = f16_at(panel + 2 * lane), i8(panel + 2 * LANES + lane)
    weights = panel + 20 * LANES + 4 * lane
    for group in range(64):
        scale, at = d * F(scales[group // 4 * LANES]), weights + 3 * VECTOR * (group // 8)
        for i in range(4):
            f32(values)[4 * group + i] = scale * F(three(at, group % 8, i) - 4)


@inline
def q2_k(panel, lane, values):
    d, dmin = f16_at(panel + 2 * lane), f16_at(panel + 2 * LANES + 2 * lane)
    scales, weights = i8(panel + 4 * LANES + lane), panel + 20 * LANES + 4 * lane
    for group in range(64):
        both, at = scales[group // 4 * LANES], weights + 2 * VECTOR * (group // 8)
        scale, least = d * F(both & 15), dmin * F(both >> 4 & 15)
        for i in range(4):
            f32(values)[4 * group + i] = scale * F(two(at, group % 8, i)) - least


@inline
def iq4_xs(panel, lane, values):
    d, scales = f16_at(panel + 2 * lane), i8(panel + 2 * LANES + lane)
    weights = panel + 12 * LANES + 4 * lane
    for group in range(64):
        scale, at = d * F(scales[group // 8 * LANES]), weights + 4 * VECTOR * (group // 8)
        for i in range(4):
            f32(values)[4 * group + i] = scale * F(UNEVEN[nibble(at, group % 8, i)])


_DECODERS = {
    "q8_0": q8_0, "q4_0": _one_scale(nibble, 8), "q4_1": _shifted(nibble),
    "q5_0": _one_scale(five, 16), "q5_1": _shifted(five), "iq4_nl": iq4_nl, "mxfp4": mxfp4,
    "q2_k": q2_k, "q3_k": q3_k, "q4_k": _lowered(paired_nibble),
    "q5_k": _lowered(five_of_part), "q6_k": q6_k, "iq4_xs": iq4_xs,
}  # fmt: skip
#: By format: the decoder, and the columns of a superblock.
VALUES = {
    name: (_DECODERS[name], block.elements) for block in PANELS for name in [block.name.lower()]
}
