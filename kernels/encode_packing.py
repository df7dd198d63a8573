"""The whole numbers of a tile, to the bytes of its blocks: the layouts of GGML's types.

Everything is arithmetic on floats that are whole numbers. `codes` is the address of numbers from 0
up in lanes, `target` that of rows of 16 bytes, of which row i becomes byte i of the blocks.
"""

from __future__ import annotations

import numpy as np

from .encode_lanes import VECTOR, ZERO, high
from .intrinsics import LANES, load, opaque, splat
from .jit import inline
from .lane_bits import store_low_bytes

_F = np.float32


@inline
def lowest(value, parts):
    """Whole numbers modulo a power of two."""
    return value - high(value, parts) * _F(parts)


@inline
def put_nibbles(target, codes, half, chunks):
    """The lowest four bits: of each 2 `half` numbers, those `half` apart share a byte."""
    for chunk in range(opaque(chunks)):
        for i in range(opaque(half)):
            at = codes + VECTOR * (2 * half * chunk + i)
            low, up = lowest(load(at), 16), lowest(load(at + VECTOR * half), 16)
            store_low_bytes(target + LANES * (half * chunk + i), low + up * _F(16))


@inline
def put_pairs(target, codes, shift):
    """Two bits: of each 128 numbers, four that are 32 apart share a byte."""
    for chunk in range(opaque(2)):
        for i in range(opaque(32)):
            byte, place = splat(ZERO), _F(1)
            for part in range(opaque(4)):
                code = high(load(codes + VECTOR * (128 * chunk + 32 * part + i)), shift)
                byte, place = byte + lowest(code, 4) * place, place * _F(4)
            store_low_bytes(target + LANES * (32 * chunk + i), byte)


@inline
def put_bits(target, codes, parts, apart, along, count):
    """One bit, that of value `parts`: 8 numbers `apart` from each other share each of the bytes."""
    for i in range(opaque(count)):
        byte, place = splat(ZERO), _F(1)
        for bit in range(opaque(8)):
            code = high(load(codes + VECTOR * (apart * bit + along * i)), parts)
            byte, place = byte + lowest(code, 2) * place, place * _F(2)
        store_low_bytes(target + LANES * i, byte)


@inline
def put_affine_scales(target, s, m):
    """8 scales and 8 offsets of six bits each, in 12 bytes."""
    for j in range(opaque(4)):
        first, last = VECTOR * j, VECTOR * (j + 4)
        tops = high(load(s + last), 16), high(load(m + last), 16)
        store_low_bytes(target + LANES * j, load(s + first) + tops[0] * _F(64))
        store_low_bytes(target + LANES * (j + 4), load(m + first) + tops[1] * _F(64))
        mixed = lowest(load(s + last), 16) + lowest(load(m + last), 16) * _F(16)
        store_low_bytes(target + LANES * (j + 8), mixed)


@inline
def put_signed_scales(target, s):
    """16 scales of six bits, from -32 to 31, in 12 bytes: four bits of each, then the other two."""
    for j in range(opaque(8)):
        low, last = load(s + VECTOR * j) + _F(32), load(s + VECTOR * (j + 8)) + _F(32)
        store_low_bytes(target + LANES * j, lowest(low, 16) + lowest(last, 16) * _F(16))
    for j in range(opaque(4)):
        byte, place = splat(ZERO), _F(1)
        for part in range(opaque(4)):
            top = high(load(s + VECTOR * (4 * part + j)) + _F(32), 16)
            byte, place = byte + top * place, place * _F(4)
        store_low_bytes(target + LANES * (8 + j), byte)


@inline
def put_table_scales(target, s):
    """8 scales of six bits, from -32 to 31: two bits of each in 2 bytes, then the others in 4."""
    for half in range(opaque(2)):
        byte, place = splat(ZERO), _F(1)
        for part in range(opaque(4)):
            top = high(load(s + VECTOR * (4 * half + part)) + _F(32), 16)
            byte, place = byte + top * place, place * _F(4)
        store_low_bytes(target + LANES * half, byte)
    for j in range(opaque(4)):
        low, up = load(s + 2 * VECTOR * j) + _F(32), load(s + 2 * VECTOR * j + VECTOR) + _F(32)
        store_low_bytes(target + LANES * (2 + j), lowest(low, 16) + lowest(up, 16) * _F(16))
