"""Products of panels with tiles of tokens, one function a format: see `formats/panels.py`.

Columns are walked in order and every block of 32 adds to its lane once, for one token as for eight;
so a row's bits do not depend on how many came with it. Within a block the sums are whole numbers,
and exact.
"""

from __future__ import annotations

import numpy as np

from .dots import TAKES_SIGNED
from .intrinsics import load_f16, load_first, prefetch, splat
from .jit import inline
from .linear import BLOCK, RECORD
from .tiles import (
    add_affine,
    add_products,
    dot,
    dot_signed,
    either,
    high_nibbles,
    load_bytes,
    load_small,
    low_nibbles,
    no_ints,
    pairs_as_high,
    spread_ints,
    store_tile,
    weighed,
    zeros,
)

VECTOR = 64
#: Bytes of 16 numbers.
HALVES, BYTES = 32, 16
SUPERBLOCK = 256
ZERO = np.float32(0)
#: Bytes between what is read and what is asked for.
AHEAD = 3072

add_q8_0 = add_products(0 if TAKES_SIGNED else -128)
add_q4_0, add_q6_k = add_products(-8), add_products(0)


@inline
def ahead(panel, nbytes):
    """Ask for what will be read in a while: a single token's weights come from memory."""
    for line in range(0, nbytes, VECTOR):
        prefetch(panel + AHEAD + line)


def q8_0(tokens):
    total_start, start = zeros(tokens), no_ints(tokens)

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // BLOCK):
            if tokens == 1:
                ahead(panel, 544)
            ints = start()
            for group in range(8):
                weights = load_bytes(panel + HALVES + VECTOR * group)
                ints = dot_signed(ints, weights, x + 4 * group, step)
            total = add_q8_0(total, ints, load_f16(panel), record, step)
            panel, x, record = panel + HALVES + 8 * VECTOR, x + BLOCK, record + RECORD
        return total

    return product


def q4_0(tokens):
    total_start, start = zeros(tokens), no_ints(tokens)

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // BLOCK):
            if tokens == 1:
                ahead(panel, 288)
            ints = start()
            for group in range(4):
                weights = load_bytes(panel + HALVES + VECTOR * group)
                ints = dot(ints, low_nibbles(weights), x + 4 * group, step)
                ints = dot(ints, high_nibbles(weights), x + 16 + 4 * group, step)
            total = add_q4_0(total, ints, load_f16(panel), record, step)
            panel, x, record = panel + HALVES + 4 * VECTOR, x + BLOCK, record + RECORD
        return total

    return product


def q4_k(tokens):
    total_start, start = zeros(tokens), no_ints(tokens)

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // SUPERBLOCK):
            d, dmin = load_f16(panel), load_f16(panel + HALVES)
            scales, weights = panel + 2 * HALVES, panel + 2 * HALVES + 16 * BYTES
            for _ in range(4):
                if tokens == 1:
                    ahead(weights, 592)
                low, high = start(), start()
                for group in range(8):
                    both = load_bytes(weights + VECTOR * group)
                    low = dot(low, low_nibbles(both), x + 4 * group, step)
                    high = dot(high, high_nibbles(both), x + BLOCK + 4 * group, step)
                scale, least = d * load_small(scales), dmin * load_small(scales + BYTES)
                total = add_affine(total, low, scale, least, record, step)
                scales, record = scales + 2 * BYTES, record + RECORD
                scale, least = d * load_small(scales), dmin * load_small(scales + BYTES)
                total = add_affine(total, high, scale, least, record, step)
                scales, record = scales + 2 * BYTES, record + RECORD
                weights, x = weights + 8 * VECTOR, x + 2 * BLOCK
            panel = weights
        return total

    return product


def q6_k(tokens):
    total_start, start = zeros(tokens), spread_ints(tokens)

    def half(low_bits, shift):
        """16 weights of each row: nibbles from one place, the pairs above them from another."""
        pairs = pairs_as_high(shift)

        @inline
        def add(low, high, x, step, ints):
            for group in range(4):
                nibbles = low_bits(load_bytes(low + VECTOR * group))
                weights = either(nibbles, pairs(load_bytes(high + VECTOR * group)))
                ints = dot(ints, weights, x + 4 * group, step)
            return ints

        return add

    def block(low_bits, shift):
        """32 weights of each row, whose halves have scales of their own."""
        add_half = half(low_bits, shift)

        @inline
        def add(low, high, scales, x, record, step, d, total):
            first = add_half(low, high, x, step, start(record + 8, step))
            low, high = low + 4 * VECTOR, high + 4 * VECTOR
            second = add_half(low, high, x + 16, step, start(record + 12, step))
            ints = weighed(first, scales, second, scales + BYTES)
            return add_q6_k(total, ints, d, record, step)

        return add

    block_0, block_1 = block(low_nibbles, 0), block(low_nibbles, 2)
    block_2, block_3 = block(high_nibbles, 4), block(high_nibbles, 6)

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // SUPERBLOCK):
            d, scales = load_f16(panel), panel + HALVES
            low = scales + 16 * BYTES
            for _ in range(2):
                other, high = low + 8 * VECTOR, low + 16 * VECTOR
                if tokens == 1:
                    ahead(low, 1680)
                total = block_0(low, high, scales, x, record, step, d, total)
                scales, x, record = scales + 2 * BYTES, x + BLOCK, record + RECORD
                total = block_1(other, high, scales, x, record, step, d, total)
                scales, x, record = scales + 2 * BYTES, x + BLOCK, record + RECORD
                total = block_2(low, high, scales, x, record, step, d, total)
                scales, x, record = scales + 2 * BYTES, x + BLOCK, record + RECORD
                total = block_3(other, high, scales, x, record, step, d, total)
                scales, x, record = scales + 2 * BYTES, x + BLOCK, record + RECORD
                low += 24 * VECTOR
            panel = low
        return total

    return product


def _stored(product):
    """A format's product as `linear_cpu.py` calls it: 16 rows, their bias, and the store."""

    def tile(tokens):
        sums = product(tokens)

        @inline
        def store(weight, row_bytes, x, step, columns, out, out_step, bias, rows):
            total = sums(weight, x, step, columns)
            addend = load_first(bias, rows) if bias != 0 else splat(ZERO)
            store_tile(total, addend, out, out_step, rows)

        return store

    return tile


PRODUCTS = {
    "q8_0": _stored(q8_0),
    "q4_0": _stored(q4_0),
    "q4_k": _stored(q4_k),
    "q6_k": _stored(q6_k),
}
