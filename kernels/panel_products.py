"""Products of panels with tiles of tokens, one function a format: see `formats/panels.py`.

Columns are walked in order and every block of 32 adds to its lane once, for one token as for eight;
so a row's bits do not depend on how many came with it. Within a block the sums are whole numbers,
and exact.
"""

from __future__ import annotations

import numpy as np

from .dots import TAKES_SIGNED
from .intrinsics import load_f16, load_first, opaque, prefetch, splat
from .jit import inline
from .linear import BLOCK, RECORD
from .tiles import (
    add_affine,
    add_products,
    dot,
    dot_signed,
    high_nibbles,
    load_bytes,
    load_small,
    low_nibbles,
    no_ints,
    six_bits,
    spread_ints,
    store_tile,
    top_bits,
    weighed,
    zeros,
)

VECTOR = 64
#: Bytes of 16 numbers.
HALVES, BYTES = 32, 16
SUPERBLOCK = 256
ZERO = np.float32(0)
#: Bytes between what is read and what is asked for.
AHEAD = 8192
#: Tokens of tiles that ask: the first ones that a panel meets, when it comes from memory.
FETCHED = 4

add_q8_0 = add_products(0 if TAKES_SIGNED else -128)
add_q4_0, add_q6_k = add_products(-8), add_products(0)


@inline
def ahead(at, nbytes):
    """Ask for what will be read in a while."""
    for line in range(0, nbytes, VECTOR):
        prefetch(at + AHEAD + line)


def _one_scale(groups, add_group, add):
    """Formats of 32 columns with one scale a row: `groups` vectors of weights behind it."""

    def tile(tokens):
        total_start, start = zeros(tokens), no_ints(tokens)

        @inline
        def product(panel, x, step, columns):
            total, record = total_start(), x + columns
            for _ in range(columns // BLOCK):
                if tokens <= FETCHED:
                    ahead(panel, HALVES)
                ints = start()
                for group in range(groups):
                    at = panel + HALVES + VECTOR * group
                    if tokens <= FETCHED:
                        ahead(at, VECTOR)
                    ints = add_group(ints, load_bytes(at), x + 4 * group, step)
                total = add(total, ints, load_f16(panel), record, step)
                panel, x = panel + HALVES + groups * VECTOR, x + BLOCK
                record += RECORD
            return total

        return product

    return tile


@inline
def bytes_group(ints, weights, x, step):
    return dot_signed(ints, weights, x, step)


@inline
def nibbles_group(ints, weights, x, step):
    ints = dot(ints, low_nibbles(weights), x, step)
    return dot(ints, high_nibbles(weights), x + 16, step)


q8_0 = _one_scale(8, bytes_group, add_q8_0)
q4_0 = _one_scale(4, nibbles_group, add_q4_0)


def q4_k(tokens):
    total_start, start = zeros(tokens), no_ints(tokens)

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // SUPERBLOCK):
            if tokens <= FETCHED:
                ahead(panel, 2 * HALVES + 16 * BYTES)
            d, dmin = load_f16(panel), load_f16(panel + HALVES)
            scales, weights = panel + 2 * HALVES, panel + 2 * HALVES + 16 * BYTES
            for _ in range(4):
                low, high = start(), start()
                for group in range(8):
                    if tokens <= FETCHED:
                        ahead(weights + VECTOR * group, VECTOR)
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
            ahead(at, 3 * VECTOR)
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
            ahead(panel, 2 * HALVES + 16 * BYTES)
            d, scales = load_f16(panel), panel + HALVES
            at = scales + 16 * BYTES + HALVES
            for _ in range(2):
                first = halves(at, x, record + 8, step)
                second = halves(at + 12 * VECTOR, x + 16, record + 12, step)
                for block in range(4):
                    ints = weighed(first[block], scales, second[block], scales + BYTES)
                    total = add_q6_k(total, ints, d, record, step)
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
                    ahead(at + 3 * VECTOR * group, VECTOR)
                ints = dot(ints, weights(at + 3 * VECTOR * group), x + 4 * group, step)
            return ints

        @inline
        def add(at, scales, x, record, step, d, total):
            first = half(at, x, step, start(record + 8, step))
            second = half(at + 12 * VECTOR, x + 16, step, start(record + 12, step))
            ints = weighed(first, scales, second, scales + BYTES)
            return add_q6_k(total, ints, d, record, step)

        return add

    # The first three blocks ask for a vector each, one after another; the fourth needs the same.
    add_one, add_fourth = block(one, tokens <= FETCHED), block(fourth, False)

    @inline
    def product(panel, x, step, columns):
        total, record = total_start(), x + columns
        for _ in range(columns // SUPERBLOCK):
            if tokens <= FETCHED:
                ahead(panel, 2 * HALVES + 16 * BYTES)
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
