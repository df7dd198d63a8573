"""Numba kernels that encode rows of weights, one a type.

They are no ops of a graph: `op` is the address of FIELDS numbers, described in `encoding.py`.
"""

from __future__ import annotations

import numpy as np

from .encode_affine import Affine, encode_block
from .encode_affine_super import encode_superblock
from .encode_codes import listed, signed, whole
from .encode_lanes import (
    VECTOR,
    all_ones,
    gather,
    gather_columns,
    normalize,
    put_half,
    scatter,
    weigh,
)
from .encode_packing import (
    put_affine_scales,
    put_bits,
    put_nibbles,
    put_pairs,
    put_signed_scales,
    put_table_scales,
)
from .encode_scaled import Scaled, encoders
from .encode_shared import STATE_FLOATS, M, S
from .encoding import BLOCKS, BLOCKS_EACH, IMPORTANCE, SOURCE, TARGET
from .float_bits import exponent
from .formats.blocks import BY_NAME, FLOATS, UNEVEN
from .intrinsics import LANES, i64, load, opaque, splat, stack
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
                all_ones(w, elements)
            else:
                columns, each = record[IMPORTANCE], record[BLOCKS_EACH]
                gather_columns(columns, w, elements, lanes, first, each)
            weigh(x, w, elements)
            tile(x, w, state, out, unit)
            scatter(out, record[TARGET] + nbytes * first, nbytes, lanes)
            first += LANES


#: An MXFP4 byte less this is a scale's exponent: it is halved, for the magnitudes are doubled.
MXFP4_BIAS = 128


def _affine(size, top, starts, trim, blocks=1, most=0) -> Affine:
    single = blocks == 1
    return Affine(size, _F(top), single, single, starts, _F(trim), blocks, _F(most))


def _scaled(size, lowest, highest, starts, trim, blocks=1, most=0) -> Scaled:
    # A quarter of the scales leave the lowest number unused; the others lose the largest values.
    first, single = 1 - trim * (starts // 4), blocks == 1
    lowest, highest, first = _F(lowest), _F(highest), _F(first)
    return Scaled(size, lowest, highest, single, starts, first, _F(trim), blocks, _F(most))


Q4_1, Q5_1 = _affine(32, 15, 4, 0.6), _affine(32, 31, 4, 0.8)
Q4_K, Q5_K = _affine(32, 15, 4, 0.6, 8, 63), _affine(32, 31, 4, 0.8, 8, 63)
Q2_K = _affine(16, 3, 4, 0.4, 16, 15)
Q4_0, Q5_0 = _scaled(32, -8, 7, 12, 0.02), _scaled(32, -16, 15, 12, 0.02)
Q3_K, Q6_K = _scaled(16, -4, 3, 8, 0.08, 16, 32), _scaled(16, -32, 31, 8, 0.015, 16, 128)
IQ4_NL, IQ4_XS = _scaled(32, -127, 113, 12, 0.02), _scaled(32, -127, 113, 8, 0.02, 8, 32)
MXFP4 = _scaled(32, -12, 12, 0, 0)
#: The least scale of MXFP4 that is tried, where the largest magnitude is from 1 to 2, and how many.
MXFP4_LEAST, MXFP4_SCALES = _F(2.0**-4), 3

_WHOLE, _IQ4, _FP4 = encoders(whole()), encoders(listed(UNEVEN)), encoders(signed(FLOATS[:8]))
_whole_super, _iq4_super, _fp4_powers = _WHOLE.superblock, _IQ4.superblock, _FP4.powers


def _q4_or_q5_k(plan, fifth: bool):
    """Q4_K, or Q5_K with a fifth bit: D, M, scales and offsets, and the numbers of 8 blocks."""

    @inline
    def tile(x, w, state, out, unit):
        d, m = encode_superblock(x, w, plan, state, unit)
        put_half(out, d * unit)
        put_half(out + 2 * LANES, m * unit)
        put_affine_scales(out + 4 * LANES, state + S, state + M)
        if fifth:
            put_bits(out + 16 * LANES, x, 16, 32, 1, 32)
            put_nibbles(out + 48 * LANES, x, 32, 4)
        else:
            put_nibbles(out + 16 * LANES, x, 32, 4)

    return tile


@inline
def _tile_q2_k(x, w, state, out, unit):
    d, m = encode_superblock(x, w, Q2_K, state, unit)
    for j in range(opaque(16)):
        scales = load(state + S + VECTOR * j) + load(state + M + VECTOR * j) * _F(16)
        store_low_bytes(out + LANES * j, scales)
    put_pairs(out + 16 * LANES, x, 1)
    put_half(out + 80 * LANES, d * unit)
    put_half(out + 82 * LANES, m * unit)


@inline
def _tile_q3_k(x, w, state, out, unit):
    d = _whole_super(x, w, Q3_K, state, unit)
    put_bits(out, x, 4, 32, 1, 32)
    put_pairs(out + 32 * LANES, x, 1)
    put_signed_scales(out + 96 * LANES, state + S)
    put_half(out + 108 * LANES, d * unit)


@inline
def _tile_q6_k(x, w, state, out, unit):
    d = _whole_super(x, w, Q6_K, state, unit)
    for chunk in range(opaque(2)):
        put_nibbles(out + 64 * LANES * chunk, x + 128 * VECTOR * chunk, 64, 1)
    put_pairs(out + 128 * LANES, x, 16)
    for j in range(opaque(16)):
        store_low_bytes(out + LANES * (192 + j), load(state + S + VECTOR * j))
    put_half(out + 208 * LANES, d * unit)


@inline
def _tile_iq4_xs(x, w, state, out, unit):
    d = _iq4_super(x, w, IQ4_XS, state, unit)
    put_half(out, d * unit)
    put_table_scales(out + 2 * LANES, state + S)
    put_nibbles(out + 8 * LANES, x, 16, 8)


def _one_scale(search, plan, fifth: bool):
    """Blocks of 32 with a scale: of 16 numbers, or of 32 with a fifth bit."""

    @inline
    def tile(x, w, state, out, unit):
        put_half(out, search(x, w, plan, unit) * unit)
        if fifth:
            put_bits(out + 2 * LANES, x, 16, 1, 8, 4)
            put_nibbles(out + 6 * LANES, x, 16, 1)
        else:
            put_nibbles(out + 2 * LANES, x, 16, 1)

    return tile


def _scale_and_offset(plan, fifth: bool):
    """Blocks of 32 with a scale and an offset."""

    @inline
    def tile(x, w, state, out, unit):
        d, o = encode_block(x, w, plan, unit)
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
    d = _fp4_powers(x, w, MXFP4, splat(MXFP4_LEAST), MXFP4_SCALES)
    # The exponent of a power of two is one more than its logarithm.
    store_low_bytes(out, exponent(d * unit) + _F(MXFP4_BIAS - 1))
    put_nibbles(out + LANES, x, 16, 1)


for _name, _tile in {
    "MXFP4": _tile_mxfp4,
    "Q4_1": _scale_and_offset(Q4_1, False),
    "Q5_1": _scale_and_offset(Q5_1, True),
    "Q4_0": _one_scale(_WHOLE.block, Q4_0, False),
    "Q5_0": _one_scale(_WHOLE.block, Q5_0, True),
    "IQ4_NL": _one_scale(_IQ4.block, IQ4_NL, False),
    "IQ4_XS": _tile_iq4_xs,
    "Q2_K": _tile_q2_k,
    "Q3_K": _tile_q3_k,
    "Q4_K": _q4_or_q5_k(Q4_K, False),
    "Q5_K": _q4_or_q5_k(Q5_K, True),
    "Q6_K": _tile_q6_k,
}.items():
    _encoder(_name, _tile)
