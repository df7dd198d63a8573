"""Products of panels with tiles of tokens: superblocks of 256 columns, a scale for each 32."""

from __future__ import annotations

from .halves import load_f16
from .intrinsics import fetch, opaque
from .jit import inline
from .linear import BLOCK, RECORD
from .panel_blocks import BYTES, HALVES, VECTOR, add_bytes, dots_fives, dots_uneven
from .tile_dots import add_affine, dot, load_signed, load_unsigned
from .tiles import AHEAD, FETCHED, no_ints, zeros
from .unpacking import high_nibbles, load_bytes, low_nibbles

SUPERBLOCK = 256


def q4_k(tokens):
    total_start, start = zeros(tokens), no_ints(tokens)

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // SUPERBLOCK):
            if tokens <= FETCHED:
                fetch(panel + AHEAD, 2 * HALVES + 16 * BYTES)
            d, dmin = load_f16(panel), load_f16(panel + HALVES)
            scales, weights = panel + 2 * HALVES, panel + 2 * HALVES + 16 * BYTES
            for _ in range(4):
                low, high = start(), start()
                for group in range(8):
                    if tokens <= FETCHED:
                        fetch(weights + VECTOR * group + AHEAD, VECTOR)
                    both = load_bytes(weights + VECTOR * group)
                    low = dot(low, low_nibbles(both), x + 4 * group, step)
                    high = dot(high, high_nibbles(both), x + BLOCK + 4 * group, step)
                scale, least = d * load_unsigned(scales), dmin * load_unsigned(scales + BYTES)
                total = add_affine(total, low, scale, least, record, step)
                scales, record = scales + 2 * BYTES, record + RECORD
                scale, least = d * load_unsigned(scales), dmin * load_unsigned(scales + BYTES)
                total = add_affine(total, high, scale, least, record, step)
                scales, record = scales + 2 * BYTES, record + RECORD
                weights, x = weights + 8 * VECTOR, x + 2 * BLOCK
            panel = weights
        return total

    return product


def q5_k(tokens):
    total_start, start = zeros(tokens), no_ints(tokens)

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // SUPERBLOCK):
            if tokens <= FETCHED:
                fetch(panel + AHEAD, 2 * HALVES + 16 * BYTES)
            d, dmin, scales = load_f16(panel), load_f16(panel + HALVES), panel + 2 * HALVES
            weights = scales + 16 * BYTES
            for _ in range(opaque(8)):
                ints = dots_fives(start(), weights, x, step)
                scale, least = d * load_unsigned(scales), dmin * load_unsigned(scales + BYTES)
                total = add_affine(total, ints, scale, least, record, step)
                scales, record = scales + 2 * BYTES, record + RECORD
                weights, x = weights + 5 * VECTOR, x + BLOCK
            panel = weights
        return total

    return product


def iq4_xs(tokens):
    total_start, start = zeros(tokens), no_ints(tokens)

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // SUPERBLOCK):
            if tokens <= FETCHED:
                fetch(panel + AHEAD, 2 * HALVES + 8 * BYTES)
            d, scales = load_f16(panel), panel + HALVES
            weights = scales + 8 * BYTES + HALVES
            for _ in range(opaque(8)):
                ints = dots_uneven(start(), weights, x, step)
                total = add_bytes(total, ints, d * load_signed(scales), record, step)
                scales, record = scales + BYTES, record + RECORD
                weights, x = weights + 4 * VECTOR, x + BLOCK
            panel = weights
        return total

    return product
