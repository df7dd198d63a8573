"""Numba kernels that encode rows of weights, one a type.

They are no ops of a graph: `op` is the address of FIELDS numbers, described in `encoding.py`.
"""

from __future__ import annotations

import numpy as np

from .encode_affine import affine_block
from .encode_affine_super import superblock
from .encode_lanes import (
    VECTOR,
    gather,
    gather_columns,
    normalize,
    put_half,
    scatter,
    weigh_by_importance,
    weigh_by_size,
)
from .encode_packing import (
    put_affine_scales,
    put_bits,
    put_nibbles,
    put_pairs,
    put_signed_scales,
    put_table_scales,
)
from .encode_scaled import (
    listed,
    powers_block,
    scaled_block,
    scaled_superblock,
    signed,
    whole,
)
from .encode_shared import STATE_FLOATS, L, M
from .encoding import BLOCKS, BLOCKS_EACH, IMPORTANCE, SOURCE, TARGET
from .float_bits import exponent
from .formats.blocks import BY_NAME
from .intrinsics import LANES, i64, load, opaque, stack
from .jit import inline, kernel
from .lane_bits import store_low_bytes

_F = np.float32


def _encoder(name: str, tile) -> None:
    """Register a kernel: tile(x, w, state, bytes, unit) encodes 16 blocks in lanes."""
    block = BY_NAME[name]
    elements, nbytes = block.elements, block.nbytes
    tile_stack, state_stack = stack(2 * LANES * elements), stack(STATE_FLOATS)
    byte_stack = stack(LANES * nbytes // 4)

    @kernel(f"encode.{name.lower()}")
    def encode(op, context, thread, threads):
        record = i64(op)
        x, state, out = tile_stack(), state_stack(), byte_stack()
        w = x + VECTOR * elements
        first = 0
        while first < record[BLOCKS]:
            lanes = min(LANES, record[BLOCKS] - first)
            gather(record[SOURCE] + 4 * elements * first, x, elements, lanes)
            unit = normalize(x, elements)
            if record[IMPORTANCE] == 0:
                weigh_by_size(x, w, elements)
            else:
                columns, each = record[IMPORTANCE], record[BLOCKS_EACH]
                gather_columns(columns, w, elements, lanes, first, each)
                weigh_by_importance(x, w, elements)
            tile(x, w, state, out, unit)
            scatter(out, record[TARGET] + nbytes * first, nbytes, lanes)
            first += LANES


#: The 16 numbers of IQ4_NL and IQ4_XS.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
#: The magnitudes of MXFP4, twice as large as they are.
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12)
#: The exponent of the least power of two that is a scale of MXFP4, halved as its numbers are doubled.
MXFP4_BIAS = 128

_q4_k = superblock(blocks=8, count=32, top=15, most=63, starts=6, rounds=4, trim=0.4)
_q5_k = superblock(blocks=8, count=32, top=31, most=63, starts=6, rounds=4, trim=0.5)
_q2_k = superblock(blocks=16, count=16, top=3, most=15, starts=4, rounds=4, trim=0.25)
_q6_k = scaled_superblock(whole(-32, 31), 16, 16, 128, starts=8, rounds=4, trim=0.01)
_q3_k = scaled_superblock(whole(-4, 3), 16, 16, 32, starts=8, rounds=4, trim=0.05)
_iq4_xs = scaled_superblock(listed(IQ4_VALUES), 8, 32, 32, starts=8, rounds=4, trim=0.02)
_iq4_nl = scaled_block(listed(IQ4_VALUES), 32, starts=12, trim=0.02)
_q4_0 = scaled_block(whole(-8, 7), 32, starts=12, trim=0.02)
_q5_0 = scaled_block(whole(-16, 15), 32, starts=12, trim=0.02)
_q4_1 = affine_block(15, 32, starts=6, trim=0.4)
_q5_1 = affine_block(31, 32, starts=6, trim=0.5)
#: The largest magnitude is at least 1, and 12 times the least of these scales.
_mxfp4 = powers_block(signed(MXFP4_VALUES), 32, first=2.0**-4, powers=3)


def _q4_or_q5_k(search, fifth: bool):
    """Q4_K, or Q5_K with a fifth bit: D, M, scales and offsets, and the numbers of 8 blocks."""

    @inline
    def tile(x, w, state, out, unit):
        d, m = search(x, w, state, unit)
        put_half(out, d * unit)
        put_half(out + 2 * LANES, m * unit)
        put_affine_scales(out + 4 * LANES, state + L, state + M)
        if fifth:
            put_bits(out + 16 * LANES, x, 16, 32, 1, 32)
            put_nibbles(out + 48 * LANES, x, 32, 4)
        else:
            put_nibbles(out + 16 * LANES, x, 32, 4)

    return tile


@inline
def _tile_q2_k(x, w, state, out, unit):
    d, m = _q2_k(x, w, state, unit)
    for j in range(opaque(16)):
        scales = load(state + L + VECTOR * j) + load(state + M + VECTOR * j) * _F(16)
        store_low_bytes(out + LANES * j, scales)
    put_pairs(out + 16 * LANES, x, 1)
    put_half(out + 80 * LANES, d * unit)
    put_half(out + 82 * LANES, m * unit)


@inline
def _tile_q3_k(x, w, state, out, unit):
    d = _q3_k(x, w, state, unit)
    put_bits(out, x, 4, 32, 1, 32)
    put_pairs(out + 32 * LANES, x, 1)
    put_signed_scales(out + 96 * LANES, state + L)
    put_half(out + 108 * LANES, d * unit)


@inline
def _tile_q6_k(x, w, state, out, unit):
    d = _q6_k(x, w, state, unit)
    for chunk in range(opaque(2)):
        put_nibbles(out + 64 * LANES * chunk, x + 128 * VECTOR * chunk, 64, 1)
    put_pairs(out + 128 * LANES, x, 16)
    for j in range(opaque(16)):
        store_low_bytes(out + LANES * (192 + j), load(state + L + VECTOR * j))
    put_half(out + 208 * LANES, d * unit)


@inline
def _tile_iq4_xs(x, w, state, out, unit):
    d = _iq4_xs(x, w, state, unit)
    put_half(out, d * unit)
    put_table_scales(out + 2 * LANES, state + L)
    put_nibbles(out + 8 * LANES, x, 16, 8)


def _one_scale(search, fifth: bool):
    """Blocks of 32 with a scale: of 16 numbers, or of 32 with a fifth bit."""

    @inline
    def tile(x, w, state, out, unit):
        put_half(out, search(x, w, state, unit) * unit)
        if fifth:
            put_bits(out + 2 * LANES, x, 16, 1, 8, 4)
            put_nibbles(out + 6 * LANES, x, 16, 1)
        else:
            put_nibbles(out + 2 * LANES, x, 16, 1)

    return tile


def _scale_and_offset(search, fifth: bool):
    """Blocks of 32 with a scale and an offset."""

    @inline
    def tile(x, w, state, out, unit):
        d, o = search(x, w, state, unit)
        put_half(out, d * unit)
        put_half(out + 2 * LANES, o * unit)
        if fifth:
            put_bits(out + 4 * LANES, x, 16, 1, 8, 4)
            put_nibbles(out + 8 * LANES, x, 16, 1)
        else:
            put_nibbles(out + 4 * LANES, x, 16, 1)

    return tile


@inline
def _tile_mxfp4(x, w, state, out, unit):
    d = _mxfp4(x, w)
    # The exponent of a power of two is one more than its logarithm.
    store_low_bytes(out, exponent(d * unit) + _F(MXFP4_BIAS - 1))
    put_nibbles(out + LANES, x, 16, 1)


for _name, _tile in {
    "MXFP4": _tile_mxfp4,
    "Q4_1": _scale_and_offset(_q4_1, False),
    "Q5_1": _scale_and_offset(_q5_1, True),
    "Q4_0": _one_scale(_q4_0, False),
    "Q5_0": _one_scale(_q5_0, True),
    "IQ4_NL": _one_scale(_iq4_nl, False),
    "IQ4_XS": _tile_iq4_xs,
    "Q2_K": _tile_q2_k,
    "Q3_K": _tile_q3_k,
    "Q4_K": _q4_or_q5_k(_q4_k, False),
    "Q5_K": _q4_or_q5_k(_q5_k, True),
    "Q6_K": _tile_q6_k,
}.items():
    _encoder(_name, _tile)
