"""How strips of a state's columns are loaded, rounded and stored, by the type it is kept in.

For every type two functions: `load(address, lanes)` and `keep(strip, address, lanes, place)`, which
stores a strip and returns what `load` will find there. `place` says what is added before rounding
(see dither.py). Of a strip that is not whole, a single vector, the first `lanes` count.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .dither import COLUMN_STEP
from .intrinsics import (
    LANES,
    call_llvm,
    first_lanes,
    ints,
    lanes_of,
    load_first,
    load_first_bf16,
    pointer_to,
    store_first,
)
from .jit import inline, intrinsic
from .strips import as_strip, load_strip, store_strip, vector_of
from .tiles import TileType, each, spread

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_NOT_A_NUMBER = 0x7FC00000


def columns_of(kind: str, count: int, whole: bool) -> tuple[Any, Any]:
    """`load` and `keep` of strips of `count` vectors of a state of type `kind`."""
    return _KINDS[kind](count, whole)


def step_of(kind: str) -> int:
    """Bytes of a value."""
    return {"f32": 4, "bf16": 2}[kind]


def _float32(count: int, whole: bool) -> tuple[Any, Any]:
    if whole:
        load_all = load_strip(count)

        @inline
        def load(address, lanes):
            return load_all(address)

        @inline
        def keep(strip, address, lanes, place):
            store_strip(strip, address)
            return strip
    else:

        @inline
        def load(address, lanes):
            return as_strip(load_first(address, lanes))

        @inline
        def keep(strip, address, lanes, place):
            store_first(address, vector_of(strip), lanes)
            return strip

    return load, keep


def _bf16(count: int, whole: bool) -> tuple[Any, Any]:
    round_all = _dithered(count)
    if whole:
        load_all, store_all = _load_upper(count), _store_upper

        @inline
        def load(address, lanes):
            return load_all(address)

        @inline
        def keep(strip, address, lanes, place):
            kept = round_all(strip, place)
            store_all(kept, address)
            return kept
    else:

        @inline
        def load(address, lanes):
            return as_strip(load_first_bf16(address, lanes))

        @inline
        def keep(strip, address, lanes, place):
            kept = round_all(strip, place)
            _store_upper_first(kept, address, lanes)
            return kept

    return load, keep


_KINDS = {"f32": _float32, "bf16": _bf16}


def _fractions(builder: ir.IRBuilder, place: ir.Value, index: int) -> ir.Value:
    """What is added in vector `index` of a strip that begins at a place: 16 of 2**32."""
    steps = [(index * LANES + lane) * COLUMN_STEP & 0xFFFFFFFF for lane in range(LANES)]
    start = spread(builder, builder.trunc(place, _I32))
    return builder.add(start, ir.Constant(lanes_of(_I32), steps))


def _dithered(count: int) -> Any:
    """A function: floats whose lower halves are zeros, from any; NaN stays NaN."""
    tile = TileType("f32", count)

    @intrinsic
    def dithered(_typing, strip, place):
        def emit(context, builder, signature, args):
            def one(index: int) -> ir.Value:
                value = builder.extract_value(args[0], index)
                bits = builder.bitcast(value, lanes_of(_I32))
                fraction = builder.lshr(_fractions(builder, args[1], index), ints(16))
                upper = builder.and_(builder.add(bits, fraction), ints(0xFFFF0000))
                odd = builder.fcmp_unordered("uno", value, value)
                kept = builder.select(odd, ints(_NOT_A_NUMBER), upper)
                return builder.bitcast(kept, lanes_of(_F32))

            return each(builder, tile, one)

        return tile(tile, types.int64), emit

    return dithered


def _load_upper(count: int) -> Any:
    """A function: floats from their upper halves."""
    tile = TileType("f32", count)

    @intrinsic
    def load(_typing, address):
        def emit(context, builder, signature, args):
            def one(index: int) -> ir.Value:
                at = builder.add(args[0], _I64(2 * LANES * index))
                halves = builder.load(pointer_to(builder, at, lanes_of(_I16)), align=2)
                wide = builder.shl(builder.zext(halves, lanes_of(_I32)), ints(16))
                return builder.bitcast(wide, lanes_of(_F32))

            return each(builder, tile, one)

        return tile(types.int64), emit

    return load


def _upper(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    bits = builder.bitcast(value, lanes_of(_I32))
    return builder.trunc(builder.lshr(bits, ints(16)), lanes_of(_I16))


@intrinsic
def _store_upper(_typing, strip, address):
    """Store the upper halves of floats."""

    def emit(context, builder, signature, args):
        for index in range(strip.tokens):
            halves = _upper(builder, builder.extract_value(args[0], index))
            at = builder.add(args[1], _I64(2 * LANES * index))
            builder.store(halves, pointer_to(builder, at, halves.type), align=2)
        return context.get_dummy_value()

    return types.void(strip, types.int64), emit


@intrinsic
def _store_upper_first(_typing, strip, address, lanes):
    """Store the upper halves of a single vector's first lanes."""

    def emit(context, builder, signature, args):
        strip_value, address, lanes = args
        halves = _upper(builder, builder.extract_value(strip_value, 0))
        call_llvm(
            builder, "llvm.masked.store.v16i16.p0", ir.VoidType(), halves,
            pointer_to(builder, address, halves.type), _I32(1), first_lanes(builder, lanes),
        )  # fmt: skip
        return context.get_dummy_value()

    return types.void(strip, types.int64, types.int64), emit
