"""Products of panels with tiles of tokens: formats whose superblock is a block of 32 columns."""

from __future__ import annotations

from .dots import TAKES_SIGNED
from .formats.blocks import FLOATS, UNEVEN
from .halves import load_f16
from .intrinsics import fetch
from .jit import inline
from .linear import BLOCK, RECORD
from .tile_dots import add_products, add_shifted, block_dots, load_powers
from .tiles import AHEAD, FETCHED, no_ints, zeros
from .unpacking import fives, looked_up, nibbles, plain

VECTOR = 64
#: Bytes of 16 numbers.
HALVES, BYTES = 32, 16

#: Added to bytes that use all 8 bits, and to the latter, so that they are not below zero.
SIGN, LEAST = 128, 12


def offset_table(table, offset):
    """A table for products that take no weight below zero."""
    return looked_up(tuple(value + offset for value in table))


dots_q8_0, dots_nibbles = block_dots(plain, signed=True), block_dots(nibbles)
dots_fives, dots_floats = block_dots(fives), block_dots(offset_table(FLOATS, LEAST))
dots_uneven = block_dots(offset_table(UNEVEN, SIGN), signed=True)
add_bytes = add_products(0 if TAKES_SIGNED else -SIGN)
add_nibbles, add_fives, add_floats = add_products(-8), add_products(-16), add_products(-LEAST)


def _product(scale_bytes, vectors, dots, add):
    """A format: its scales, its vectors of weights, the products, and what adds them."""

    def tile(tokens):
        total_start, start = zeros(tokens), no_ints(tokens)

        @inline
        def product(panel, x, step, columns):
            total, record = total_start(), x + columns
            for _ in range(columns // BLOCK):
                if tokens <= FETCHED:
                    fetch(panel + AHEAD, scale_bytes)
                ints = dots(start(), panel + scale_bytes, x, step)
                total = add(total, ints, panel, record, step)
                panel, x = panel + scale_bytes + vectors * VECTOR, x + BLOCK
                record += RECORD
            return total

        return product

    return tile


def _scaled(add):
    @inline
    def add_block(total, ints, scales, record, step):
        return add(total, ints, load_f16(scales), record, step)

    return add_block


@inline
def shifted(total, ints, scales, record, step):
    return add_shifted(total, ints, load_f16(scales), load_f16(scales + HALVES), record, step)


@inline
def by_powers(total, ints, scales, record, step):
    return add_floats(total, ints, load_powers(scales), record, step)


q8_0 = _product(HALVES, 8, dots_q8_0, _scaled(add_bytes))
q4_0 = _product(HALVES, 4, dots_nibbles, _scaled(add_nibbles))
q4_1 = _product(2 * HALVES, 4, dots_nibbles, shifted)
q5_0 = _product(HALVES, 5, dots_fives, _scaled(add_fives))
q5_1 = _product(2 * HALVES, 5, dots_fives, shifted)
iq4_nl = _product(HALVES, 4, dots_uneven, _scaled(add_bytes))
mxfp4 = _product(BYTES, 4, dots_floats, by_powers)
