"""One row of a panel, decoded to float32, superblock by superblock: what an embedding takes."""

from __future__ import annotations

import numpy as np

from .formats.panels import LANES
from .intrinsics import f16_at, f32, i8
from .jit import inline

FLOAT, VECTOR = 4, 4 * LANES
F = np.float32


@inline
def q8_0(panel, lane, values):
    scale, weights = f16_at(panel + 2 * lane), panel + 2 * LANES + 4 * lane
    for group in range(8):
        four = i8(weights + VECTOR * group)
        for i in range(4):
            f32(values)[4 * group + i] = scale * F(np.int8(four[i] ^ -128))


@inline
def q4_0(panel, lane, values):
    scale, weights = f16_at(panel + 2 * lane), panel + 2 * LANES + 4 * lane
    for group in range(4):
        both = i8(weights + VECTOR * group)
        for i in range(4):
            f32(values)[4 * group + i] = scale * F((both[i] & 15) - 8)
            f32(values)[16 + 4 * group + i] = scale * F((both[i] >> 4 & 15) - 8)


@inline
def q4_k(panel, lane, values):
    d, dmin = f16_at(panel + 2 * lane), f16_at(panel + 2 * LANES + 2 * lane)
    scales, weights = i8(panel + 4 * LANES + lane), panel + 20 * LANES + 4 * lane
    for pair in range(4):
        for half in range(2):
            at = (4 * pair + 2 * half) * LANES
            scale, least = d * F(scales[at]), dmin * F(scales[at + LANES])
            for group in range(8):
                both = i8(weights + VECTOR * (8 * pair + group))
                for i in range(4):
                    q = both[i] >> 4 * half & 15
                    f32(values)[64 * pair + 32 * half + 4 * group + i] = scale * F(q) - least


@inline
def q6_k(panel, lane, values):
    d, scales = f16_at(panel + 2 * lane), i8(panel + 2 * LANES + lane)
    for group in range(64):
        # 128 columns are 4 blocks of 32; the last one's bits stand above those of the others.
        chunk, block, column = group // 32, group // 8 % 4, group % 8
        vectors = i8(panel + 20 * LANES + 4 * lane + VECTOR * 3 * (8 * chunk + column))
        scale = d * F(scales[group // 4 * LANES])
        for i in range(4):
            if block < 3:
                q = vectors[VECTOR * block + i] & 63
            else:
                low, mid, top = vectors[i], vectors[VECTOR + i], vectors[2 * VECTOR + i]
                q = low >> 6 & 3 | mid >> 4 & 12 | top >> 2 & 48
            f32(values)[4 * group + i] = scale * F(q - 32)


#: By format: the decoder, and the columns of a superblock.
VALUES = {"q8_0": (q8_0, 32), "q4_0": (q4_0, 32), "q4_k": (q4_k, 256), "q6_k": (q6_k, 256)}
