"""Bytes of weights, 4 of each of 16 rows in a vector, made of what vectors of panels hold.

`formats/panels.py` says where the bits of a weight lie. What unpacks a block of 32 columns is given
a function that loads its vectors, as 16 words each, and yields (group, weights as words) for each
of its 8 groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from .dots import emit_lookup
from .intrinsics import LANES, pointer_to
from .isa import isa
from .jit import intrinsic

_I8, _I32 = ir.IntType(8), ir.IntType(32)
_WORDS, _BYTES = ir.VectorType(_I32, LANES), ir.VectorType(_I8, 4 * LANES)

Load = Callable[[int], ir.Value]
Unpack = Callable[[ir.IRBuilder, Load], Iterator[tuple[int, ir.Value]]]


class BytesType(types.Type):
    """64 bytes in a vector register: 4 consecutive weights of 16 rows."""

    def __init__(self) -> None:
        super().__init__("u8x64")


u8x64 = BytesType()


@register_model(BytesType)
class _BytesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _BYTES)


def load_words(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """A vector of a panel."""
    return builder.load(pointer_to(builder, address, _WORDS), align=1)


def as_bytes(builder: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """A vector of a panel as 64 bytes."""
    return builder.bitcast(words, _BYTES)


def _bits(builder: ir.IRBuilder, words: ir.Value, down: int, mask: int) -> ir.Value:
    """Bits of every byte, moved down, or up where `down` is negative, and masked.

    All of it goes by words, whose shifts every processor has.
    """
    if down:
        shift = builder.lshr if down > 0 else builder.shl
        words = shift(words, ir.Constant(_WORDS, [abs(down)] * LANES))
    return builder.and_(words, ir.Constant(_WORDS, [mask * 0x01010101] * LANES))


# ---- blocks of 32 columns


def plain(builder: ir.IRBuilder, load: Load) -> Iterator[tuple[int, ir.Value]]:
    """8 vectors of bytes."""
    for group in range(8):
        yield group, load(group)


def nibbles(builder: ir.IRBuilder, load: Load) -> Iterator[tuple[int, ir.Value]]:
    """4 vectors of nibbles."""
    for i in range(4):
        both = load(i)
        yield i, _bits(builder, both, 0, 0x0F)
        yield 4 + i, _bits(builder, both, 4, 0x0F)


def looked_up(table: tuple[int, ...]) -> Unpack:
    """4 vectors of nibbles, each of which stands for a byte of a table."""

    def unpack(builder: ir.IRBuilder, load: Load) -> Iterator[tuple[int, ir.Value]]:
        for group, codes in nibbles(builder, load):
            found = emit_lookup(builder, as_bytes(builder, codes), table, isa().name)
            yield group, builder.bitcast(found, _WORDS)

    return unpack


def fives(builder: ir.IRBuilder, load: Load) -> Iterator[tuple[int, ir.Value]]:
    """4 vectors of nibbles and one of top bits."""
    tops = load(4)
    for group, four in nibbles(builder, load):
        yield group, builder.or_(four, _bits(builder, tops, group - 4, 0x10))


def threes(builder: ir.IRBuilder, load: Load) -> Iterator[tuple[int, ir.Value]]:
    """3 vectors, as weights of 3 bits times 8."""
    words = [load(i) for i in range(3)]
    for i, word in enumerate(words):
        yield 2 * i, _bits(builder, word, 0, 0x38)
        yield 2 * i + 1, _bits(builder, word, -3, 0x38)
    for i in range(2):
        upper, lowest = _bits(builder, words[i], 2, 0x30), _bits(builder, words[2], 3 + i, 0x08)
        yield 6 + i, builder.or_(upper, lowest)


def twos(builder: ir.IRBuilder, load: Load) -> Iterator[tuple[int, ir.Value]]:
    """A vector of pairs of bits, which is half a block."""
    word = load(0)
    for group in range(4):
        yield group, _bits(builder, word, 2 * group, 0x03)


# ---- single vectors


@intrinsic
def load_bytes(_typing, address):
    """64 bytes."""

    def emit(context, builder, signature, args):
        return as_bytes(builder, load_words(builder, args[0]))

    return u8x64(types.int64), emit


def _masked(down: int, mask: int) -> Any:
    @intrinsic
    def function(_typing, vector):
        def emit(context, builder, signature, args):
            words = builder.bitcast(args[0], _WORDS)
            return as_bytes(builder, _bits(builder, words, down, mask))

        return u8x64(u8x64), emit

    return function


low_nibbles, high_nibbles, six_bits = _masked(0, 0x0F), _masked(4, 0x0F), _masked(0, 0x3F)


@intrinsic
def top_bits(_typing, a, b, c):
    """Six bits of each byte: the top two of a, above them those of b, above them those of c."""

    def emit(context, builder, signature, args):
        found = None
        for vector, down, mask in zip(args, (6, 4, 2), (0x03, 0x0C, 0x30), strict=True):
            part = _bits(builder, builder.bitcast(vector, _WORDS), down, mask)
            found = part if found is None else builder.or_(found, part)
        return as_bytes(builder, found)

    return u8x64(u8x64, u8x64, u8x64), emit
