"""How strips of a state's columns are loaded, rounded and stored, by the type it is kept in.

For every type two functions: `load(address, lanes)` and `keep(strip, address, lanes, place,
dither)`, which stores a strip and returns what `load` will find there. `place` and `dither` say
what is added before rounding (see dither.py). Of a strip that is not whole, a single vector, the
first `lanes` count. Those of INT8 are whole numbers, in units of scales that lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
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

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
#: Added to a smaller number, it leaves it rounded to a whole one, in the lowest bits.
_ROUNDER = 1.5 * 2.0**23


def columns_of(kind: str, count: int, whole: bool) -> tuple[Any, Any]:
    """`load` and `keep` of strips of `count` vectors of a state of type `kind`."""
    return _KINDS[kind](count, whole)


def step_of(kind: str) -> int:
    """Bytes of a value."""
    return {"f32": 4, "bf16": 2, "int8": 1}[kind]


def _float32(count: int, whole: bool) -> tuple[Any, Any]:
    if whole:
        load_all = load_strip(count)

        @inline
        def load(address, lanes):
            return load_all(address)

        @inline
        def keep(strip, address, lanes, place, dither):
            store_strip(strip, address)
            return strip
    else:

        @inline
        def load(address, lanes):
            return as_strip(load_first(address, lanes))

        @inline
        def keep(strip, address, lanes, place, dither):
            store_first(address, vector_of(strip), lanes)
            return strip

    return load, keep


def _bf16(count: int, whole: bool) -> tuple[Any, Any]:
    round_all = _rounding(count, _rounded_upper)
    if whole:
        load_all, store_all = _load_upper(count), _store_upper

        @inline
        def load(address, lanes):
            return load_all(address)

        @inline
        def keep(strip, address, lanes, place, dither):
            kept = round_all(strip, place, dither)
            store_all(kept, address)
            return kept
    else:

        @inline
        def load(address, lanes):
            return as_strip(load_first_bf16(address, lanes))

        @inline
        def keep(strip, address, lanes, place, dither):
            kept = round_all(strip, place, dither)
            _store_upper_first(kept, address, lanes)
            return kept

    return load, keep


def _int8(count: int, whole: bool) -> tuple[Any, Any]:
    load_all, round_all = _load_bytes(count), _rounding(count, _raised)
    lower = _rounding(count, lambda builder, value, _: builder.fsub(value, _numbers(_ROUNDER)))
    if whole:

        @inline
        def load(address, lanes):
            return load_all(address)

        @inline
        def keep(strip, address, lanes, place, dither):
            raised = round_all(strip, place, dither)
            _store_bytes(raised, address)
            return lower(raised, place, dither)
    else:

        @inline
        def load(address, lanes):
            return _load_bytes_first(address, lanes)

        @inline
        def keep(strip, address, lanes, place, dither):
            raised = round_all(strip, place, dither)
            _store_bytes_first(raised, address, lanes)
            return lower(raised, place, dither)

    return load, keep


_KINDS = {"f32": _float32, "bf16": _bf16, "int8": _int8}


def _fractions(builder: ir.IRBuilder, place: ir.Value, dither: ir.Value) -> ir.Value:
    """What is added to each vector of a strip in a row that begins at a place: 16 of 2**16."""
    steps = [lane * COLUMN_STEP & 0xFFFFFFFF for lane in range(LANES)]
    start, mask = (spread(builder, builder.trunc(value, _I32)) for value in (place, dither))
    added = builder.add(start, builder.and_(mask, ir.Constant(lanes_of(_I32), steps)))
    return builder.lshr(added, ints(16))


def _rounding(count: int, make: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Any:
    """A function (strip, place, dither) -> strip: what `make` has of a vector and its fractions."""
    tile = TileType("f32", count)

    @intrinsic
    def rounded(_typing, strip, place, dither):
        def emit(context, builder, signature, args):
            value, place, dither = args
            added = _fractions(builder, place, dither)
            return each(
                builder, tile, lambda i: make(builder, builder.extract_value(value, i), added)
            )

        return tile(tile, types.int64, types.int64), emit

    return rounded


# ---- BF16: floats whose lower halves are zeros


def _rounded_upper(builder: ir.IRBuilder, value: ir.Value, added: ir.Value) -> ir.Value:
    bits = builder.bitcast(value, lanes_of(_I32))
    # What comes out of a sum is a quiet NaN, which its upper half is too.
    number = builder.fcmp_ordered("ord", value, value)
    rounded = builder.select(number, builder.add(bits, added), bits)
    return builder.bitcast(builder.and_(rounded, ints(0xFFFF0000)), lanes_of(_F32))


def _widened(builder: ir.IRBuilder, halves: ir.Value) -> ir.Value:
    wide = builder.shl(builder.zext(halves, lanes_of(_I32)), ints(16))
    return builder.bitcast(wide, lanes_of(_F32))


def _upper(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    bits = builder.bitcast(value, lanes_of(_I32))
    return builder.trunc(builder.lshr(bits, ints(16)), lanes_of(_I16))


# ---- INT8: floats that are whole numbers, raised so far that they stand in the lowest bits


def _raised(builder: ir.IRBuilder, value: ir.Value, added: ir.Value) -> ir.Value:
    part = builder.fmul(builder.sitofp(added, value.type), _numbers(2.0**-16))
    moved = builder.fadd(value, builder.fsub(part, _numbers(0.5)))
    return builder.fadd(moved, _numbers(_ROUNDER))


def _numbers(value: float) -> ir.Constant:
    return ir.Constant(lanes_of(_F32), [value] * LANES)


def _from_bytes(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.sitofp(builder.sext(value, lanes_of(_I32)), lanes_of(_F32))


def _to_bytes(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.trunc(builder.bitcast(value, lanes_of(_I32)), lanes_of(_I8))


# ---- loads and stores


def _load_of(element: ir.Type, widen: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    """A function: count -> a function that loads a strip."""

    def loads(count: int) -> Any:
        tile = TileType("f32", count)

        @intrinsic
        def load(_typing, address):
            def emit(context, builder, signature, args):
                def one(index: int) -> ir.Value:
                    at = builder.add(args[0], _I64(element.width // 8 * LANES * index))
                    return widen(
                        builder, builder.load(pointer_to(builder, at, lanes_of(element)), align=1)
                    )

                return each(builder, tile, one)

            return tile(types.int64), emit

        return load

    return loads


def _stores_of(element: ir.Type, narrowed: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    """Two functions: one stores a strip, the other a single vector's first lanes."""

    @intrinsic
    def store(_typing, strip, address):
        def emit(context, builder, signature, args):
            for index in range(strip.tokens):
                value = narrowed(builder, builder.extract_value(args[0], index))
                at = builder.add(args[1], _I64(element.width // 8 * LANES * index))
                builder.store(value, pointer_to(builder, at, value.type), align=1)
            return context.get_dummy_value()

        return types.void(strip, types.int64), emit

    @intrinsic
    def store_some(_typing, strip, address, lanes):
        def emit(context, builder, signature, args):
            strip_value, address, lanes = args
            value = narrowed(builder, builder.extract_value(strip_value, 0))
            call_llvm(
                builder, f"llvm.masked.store.v16i{element.width}.p0", ir.VoidType(), value,
                pointer_to(builder, address, value.type), _I32(1), first_lanes(builder, lanes),
            )  # fmt: skip
            return context.get_dummy_value()

        return types.void(strip, types.int64, types.int64), emit

    return store, store_some


@intrinsic
def _load_bytes_first(_typing, address, lanes):
    """The first lanes of a single vector, the others zero."""
    tile, vector = TileType("f32", 1), lanes_of(_I8)

    def emit(context, builder, signature, args):
        pointer, mask = pointer_to(builder, args[0], vector), first_lanes(builder, args[1])
        zero = ir.Constant(vector, None)
        value = call_llvm(
            builder, "llvm.masked.load.v16i8.p0", vector, pointer, _I32(1), mask, zero
        )
        return each(builder, tile, lambda _: _from_bytes(builder, value))

    return tile(types.int64, types.int64), emit


_load_upper, _load_bytes = _load_of(_I16, _widened), _load_of(_I8, _from_bytes)
_store_upper, _store_upper_first = _stores_of(_I16, _upper)
_store_bytes, _store_bytes_first = _stores_of(_I8, _to_bytes)
