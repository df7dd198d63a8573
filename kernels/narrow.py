"""How strips of a state's columns are loaded, rounded and stored, by the type it is kept in.

For every type two functions: `load(address, lanes)` and `keep(strip, address, lanes, place,
dither)`, which stores a strip and returns what `load` will find there. `place` and `dither` say
what is added before rounding (see dither.py). Of a strip that is not whole, a single vector, the
first `lanes` count. Those of INT8 are whole numbers, in units of scales that lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from .dither import COLUMN_STEP
from .halves import emit_widen_bf16
from .intrinsics import (
    LANES,
    emit_load_first,
    emit_store_first,
    floats,
    ints,
    lanes_of,
    pointer_to,
    spread,
)
from .jit import inline, intrinsic
from .tiles import TileType, each

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
#: Added to a smaller number, it leaves it rounded to a whole one, in the lowest bits.
_ROUNDER = 1.5 * 2.0**23

Emit = Callable[..., ir.Value]


class _Kept(NamedTuple):
    """How 16 floats are kept; all functions emit code, from a builder and a vector.

    element  what each of them becomes, of `nbytes`
    widen    elements -> floats
    rounded  floats and what is added to them -> floats that `narrow` makes elements of
    narrow   these -> elements
    value    these -> the floats that `widen` makes of the elements
    """

    element: ir.Type
    nbytes: int
    widen: Emit
    rounded: Emit
    narrow: Emit
    value: Emit


def columns_of(kind: str, count: int, whole: bool) -> tuple[Any, Any]:
    """`load` and `keep` of strips of `count` vectors of a state of type `kind`."""
    kept = _KINDS[kind]
    load, put = (_load, _store) if whole else (_load_first, _store_first)
    put = put(kept)
    rounded = _each_of(count, kept.rounded)
    value = _each_of(count, lambda builder, vector, added: kept.value(builder, vector))

    @inline
    def keep(strip, address, lanes, place, dither):
        made = rounded(strip, place, dither)
        put(made, address, lanes)
        return value(made, place, dither)

    return load(kept, count), keep


def step_of(kind: str) -> int:
    """Bytes of a value."""
    return _KINDS[kind].nbytes


# ---- rounding


def _fractions(builder: ir.IRBuilder, place: ir.Value, dither: ir.Value) -> ir.Value:
    """What is added to each vector of a strip in a row that begins at a place: 16 of 2**16."""
    steps = [lane * COLUMN_STEP & 0xFFFFFFFF for lane in range(LANES)]
    start, mask = (spread(builder, builder.trunc(value, _I32)) for value in (place, dither))
    added = builder.add(start, builder.and_(mask, ir.Constant(lanes_of(_I32), steps)))
    return builder.lshr(added, ints(16))


def _each_of(count: int, make: Emit) -> Any:
    """A function (strip, place, dither) -> strip: what `make` has of a vector and its fractions."""
    tile = TileType("f32", count)

    @intrinsic
    def made(_typing, strip, place, dither):
        def emit(context, builder, signature, args):
            value, place, dither = args
            added = _fractions(builder, place, dither)
            return each(
                builder, tile, lambda i: make(builder, builder.extract_value(value, i), added)
            )

        return tile(tile, types.int64, types.int64), emit

    return made


# ---- loads and stores


def _load(kept: _Kept, count: int) -> Any:
    tile, vector = TileType("f32", count), lanes_of(kept.element)

    @intrinsic
    def load(_typing, address, lanes):
        def emit(context, builder, signature, args):
            def one(index: int) -> ir.Value:
                at = builder.add(args[0], _I64(kept.nbytes * LANES * index))
                return kept.widen(builder, builder.load(pointer_to(builder, at, vector), align=1))

            return each(builder, tile, one)

        return tile(types.int64, types.int64), emit

    return load


def _load_first(kept: _Kept, count: int) -> Any:
    tile = TileType("f32", count)

    @intrinsic
    def load(_typing, address, lanes):
        def emit(context, builder, signature, args):
            value = kept.widen(builder, emit_load_first(builder, args[0], kept.element, args[1]))
            return each(builder, tile, lambda _: value)

        return tile(types.int64, types.int64), emit

    return load


def _store(kept: _Kept) -> Any:
    @intrinsic
    def store(_typing, strip, address, lanes):
        def emit(context, builder, signature, args):
            for index in range(strip.tokens):
                value = kept.narrow(builder, builder.extract_value(args[0], index))
                at = builder.add(args[1], _I64(kept.nbytes * LANES * index))
                builder.store(value, pointer_to(builder, at, value.type), align=1)
            return context.get_dummy_value()

        return types.void(strip, types.int64, types.int64), emit

    return store


def _store_first(kept: _Kept) -> Any:
    @intrinsic
    def store(_typing, strip, address, lanes):
        def emit(context, builder, signature, args):
            value = kept.narrow(builder, builder.extract_value(args[0], 0))
            emit_store_first(builder, args[1], value, args[2])
            return context.get_dummy_value()

        return types.void(strip, types.int64, types.int64), emit

    return store


# ---- the types


def _same(builder: ir.IRBuilder, value: ir.Value, *_added: ir.Value) -> ir.Value:
    return value


def _rounded_upper(builder: ir.IRBuilder, value: ir.Value, added: ir.Value) -> ir.Value:
    bits = builder.bitcast(value, lanes_of(_I32))
    # What comes out of a sum is a quiet NaN, which its upper half is too.
    number = builder.fcmp_ordered("ord", value, value)
    rounded = builder.select(number, builder.add(bits, added), bits)
    return builder.bitcast(builder.and_(rounded, ints(0xFFFF0000)), lanes_of(_F32))


def _upper(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    bits = builder.bitcast(value, lanes_of(_I32))
    return builder.trunc(builder.lshr(bits, ints(16)), lanes_of(_I16))


def _raised(builder: ir.IRBuilder, value: ir.Value, added: ir.Value) -> ir.Value:
    part = builder.fmul(builder.sitofp(added, value.type), floats(2.0**-16))
    moved = builder.fadd(value, builder.fsub(part, floats(0.5)))
    return builder.fadd(moved, floats(_ROUNDER))


def _lowered(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.fsub(value, floats(_ROUNDER))


def _from_bytes(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.sitofp(builder.sext(value, lanes_of(_I32)), lanes_of(_F32))


def _to_bytes(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.trunc(builder.bitcast(value, lanes_of(_I32)), lanes_of(_I8))


_KINDS = {
    "f32": _Kept(_F32, 4, _same, _same, _same, _same),
    # Floats whose lower halves are zeros.
    "bf16": _Kept(_I16, 2, emit_widen_bf16, _rounded_upper, _upper, _same),
    # Whole numbers, raised so far that they stand in the lowest bits.
    "int8": _Kept(_I8, 1, _from_bytes, _raised, _to_bytes, _lowered),
}
