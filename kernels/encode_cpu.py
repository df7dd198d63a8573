"""Numba kernels that encode rows of weights, one a type.

They are no ops of a graph: `op` is the address of FIELDS numbers, described in `encoding.py`.
"""

from __future__ import annotations

import numpy as np

from .encode_affine_super import STATE_FLOATS, L, M, superblock
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
from .encode_packing import lowest, put_affine_scales, put_bits, put_nibbles, put_pairs
from .encoding import BLOCKS, BLOCKS_EACH, IMPORTANCE, SOURCE, TARGET
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


_q4_k = superblock(blocks=8, count=32, top=15, most=63, starts=4, rounds=4, trim=0.4)
_q5_k = superblock(blocks=8, count=32, top=31, most=63, starts=4, rounds=4, trim=0.5)
_q2_k = superblock(blocks=16, count=16, top=3, most=15, starts=4, rounds=4, trim=0.25)


@inline
def _tile_q4_k(x, w, state, out, unit):
    d, m = _q4_k(x, w, state, unit)
    put_half(out, d * unit)
    put_half(out + 2 * LANES, m * unit)
    put_affine_scales(out + 4 * LANES, state + L, state + M)
    put_nibbles(out + 16 * LANES, x, 32, 4)


@inline
def _tile_q5_k(x, w, state, out, unit):
    d, m = _q5_k(x, w, state, unit)
    put_half(out, d * unit)
    put_half(out + 2 * LANES, m * unit)
    put_affine_scales(out + 4 * LANES, state + L, state + M)
    put_bits(out + 16 * LANES, x, 16, 32, 1, 32)
    put_nibbles(out + 48 * LANES, x, 32, 4)


@inline
def _tile_q2_k(x, w, state, out, unit):
    d, m = _q2_k(x, w, state, unit)
    for j in range(opaque(16)):
        scales = load(state + L + VECTOR * j) + load(state + M + VECTOR * j) * _F(16)
        store_low_bytes(out + LANES * j, scales)
    put_pairs(out + 16 * LANES, x, 1)
    put_half(out + 80 * LANES, d * unit)
    put_half(out + 82 * LANES, m * unit)


for _name, _tile in {"Q4_K": _tile_q4_k, "Q5_K": _tile_q5_k, "Q2_K": _tile_q2_k}.items():
    _encoder(_name, _tile)
