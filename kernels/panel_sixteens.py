"""Products of panels with tiles of tokens: superblocks of 256 columns, a scale for each 16.

Scales are whole numbers, so that a block of 32 columns is one too before it is added.
"""

from __future__ import annotations

import numpy as np

from .halves import load_f16
from .intrinsics import fetch, opaque, splat
from .jit import inline
from .linear import BLOCK, RECORD
from .panel_blocks import BYTES, HALVES, VECTOR
from .panel_superblocks import SUPERBLOCK
from .tile_dots import add_halves, add_products, block_dots, dot, weighed
from .tiles import AHEAD, FETCHED, no_ints, spread_ints, zeros
from .unpacking import load_bytes, six_bits, threes, top_bits, twos

FIRST, SECOND = range(4), range(4, 8)
add_whole, dots_twos = add_products(0), block_dots(twos)
# The second half's weights are in the same vectors.
dots_first, dots_second = block_dots(threes, FIRST), block_dots(threes, SECOND, fetches=False)
# Weights of 3 bits come times 8, and sums of activations times -32.
EIGHTH, THIRTY_SECOND = np.float32(1 / 8), np.float32(1 / 32)


def q6_k(tokens):
    return _q6_k_single() if tokens == 1 else _q6_k_tile(tokens)


def _q6_k_single():
    """Four blocks at once, so that a token's weights are read once, from end to end.

    The loop over them is kept a loop: unrolled, all its loads and prefetches would come at once,
    more than can be under way, and memory and arithmetic would wait for each other in turn.
    """
    total_start, start = zeros(1), spread_ints(1)

    @inline
    def halves(at, x, record, step):
        """16 columns of every block."""
        a, b = start(record, step), start(record + RECORD, step)
        c, d = start(record + 2 * RECORD, step), start(record + 3 * RECORD, step)
        for group in range(opaque(4)):
            fetch(at + AHEAD, 3 * VECTOR)
            u, v, w = load_bytes(at), load_bytes(at + VECTOR), load_bytes(at + 2 * VECTOR)
            a = dot(a, six_bits(u), x + 4 * group, step)
            b = dot(b, six_bits(v), x + BLOCK + 4 * group, step)
            c = dot(c, six_bits(w), x + 2 * BLOCK + 4 * group, step)
            d = dot(d, top_bits(u, v, w), x + 3 * BLOCK + 4 * group, step)
            at += 3 * VECTOR
        return a, b, c, d

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // SUPERBLOCK):
            fetch(panel + AHEAD, 2 * HALVES + 16 * BYTES)
            d, scales = load_f16(panel), panel + HALVES
            at = scales + 16 * BYTES + HALVES
            for _ in range(2):
                first = halves(at, x, record + 8, step)
                second = halves(at + 12 * VECTOR, x + 16, record + 12, step)
                for block in range(4):
                    ints = weighed(first[block], scales, second[block], scales + BYTES)
                    total = add_whole(total, ints, d, record, step)
                    scales, record = scales + 2 * BYTES, record + RECORD
                at, x = at + 24 * VECTOR, x + 4 * BLOCK
            panel = at
        return total

    return product


def _q6_k_tile(tokens):
    """Block by block: the sums of all tokens fill the registers."""
    total_start, start = zeros(tokens), spread_ints(tokens)

    @inline
    def one(at):
        return six_bits(load_bytes(at))

    @inline
    def fourth(at):
        return top_bits(load_bytes(at), load_bytes(at + VECTOR), load_bytes(at + 2 * VECTOR))

    def block(weights, fetches):
        @inline
        def half(at, x, step, ints):
            for group in range(4):
                if fetches:
                    fetch(at + 3 * VECTOR * group + AHEAD, VECTOR)
                ints = dot(ints, weights(at + 3 * VECTOR * group), x + 4 * group, step)
            return ints

        @inline
        def add(at, scales, x, record, step, d, total):
            first = half(at, x, step, start(record + 8, step))
            second = half(at + 12 * VECTOR, x + 16, step, start(record + 12, step))
            ints = weighed(first, scales, second, scales + BYTES)
            return add_whole(total, ints, d, record, step)

        return add

    # The first three blocks ask for a vector each, one after another; the fourth needs the same.
    add_one, add_fourth = block(one, tokens <= FETCHED), block(fourth, False)

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // SUPERBLOCK):
            if tokens <= FETCHED:
                fetch(panel + AHEAD, 2 * HALVES + 16 * BYTES)
            d, scales = load_f16(panel), panel + HALVES
            at = scales + 16 * BYTES + HALVES
            for _ in range(2):
                for vector in range(3):
                    total = add_one(at + VECTOR * vector, scales, x, record, step, d, total)
                    scales, x, record = scales + 2 * BYTES, x + BLOCK, record + RECORD
                total = add_fourth(at, scales, x, record, step, d, total)
                scales, x, record = scales + 2 * BYTES, x + BLOCK, record + RECORD
                at += 24 * VECTOR
            panel = at
        return total

    return product


def q3_k(tokens):
    """A record's -32 times the sums make up for weights that are too large by 4."""
    total_start, start = zeros(tokens), spread_ints(tokens)

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // SUPERBLOCK):
            if tokens <= FETCHED:
                fetch(panel + AHEAD, 2 * HALVES + 16 * BYTES)
            d, scales = load_f16(panel) * splat(EIGHTH), panel + HALVES
            at = scales + 16 * BYTES + HALVES
            for _ in range(opaque(8)):
                first = dots_first(start(record + 8, step), at, x, step)
                second = dots_second(start(record + 12, step), at, x, step)
                ints = weighed(first, scales, second, scales + BYTES)
                total = add_whole(total, ints, d, record, step)
                scales, record = scales + 2 * BYTES, record + RECORD
                at, x = at + 3 * VECTOR, x + BLOCK
            panel = at
        return total

    return product


def q2_k(tokens):
    total_start, start = zeros(tokens), no_ints(tokens)

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // SUPERBLOCK):
            if tokens <= FETCHED:
                fetch(panel + AHEAD, 2 * HALVES + 16 * BYTES)
            d, scales = load_f16(panel), panel + 2 * HALVES
            # Minima are subtracted, and the sums they meet are negative.
            dmin, at = load_f16(panel + HALVES) * splat(THIRTY_SECOND), scales + 16 * BYTES
            for _ in range(opaque(8)):
                first = dots_twos(start(), at, x, step)
                second = dots_twos(start(), at + VECTOR, x + BLOCK // 2, step)
                total = add_halves(total, first, second, scales, d, dmin, record, step)
                scales, record = scales + 2 * BYTES, record + RECORD
                at, x = at + 2 * VECTOR, x + BLOCK
            panel = at
        return total

    return product
