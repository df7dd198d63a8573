"""Grids: a few queries against a few keys, or values, a vector for every pair of them in registers.

What is loaded once so meets several others. A sum has the same order in a grid of any size.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .halves import emit_widen_f16
from .intrinsics import LANES, emit_fma, lanes_of, pointer_to, spread
from .jit import intrinsic
from .tiles import TileType, each

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()
_VECTOR = lanes_of(_F32)
_BYTES = 4 * LANES
#: Vectors of a grid.
CELLS = 16


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.load(pointer_to(builder, address, kind), align=1)


def _moved(builder: ir.IRBuilder, address: ir.Value, step: ir.Value, count: int) -> ir.Value:
    return builder.add(address, builder.mul(step, _I64(count))) if count else address


def _floats(builder: ir.IRBuilder, row: ir.Value, index: ir.Value) -> ir.Value:
    return _load(builder, builder.add(row, builder.mul(index, _I64(_BYTES))), _VECTOR)


def _halves(builder: ir.IRBuilder, row: ir.Value, index: ir.Value) -> ir.Value:
    at = builder.add(row, builder.mul(index, _I64(_BYTES // 2)))
    return emit_widen_f16(builder, _load(builder, at, lanes_of(_F16)))


def _bytes(builder: ir.IRBuilder, row: ir.Value, index: ir.Value) -> ir.Value:
    """Of blocks of two vectors: a half, the scale, and 32 signed bytes."""
    block = builder.add(row, builder.mul(builder.lshr(index, _I64(1)), _I64(34)))
    at = builder.add(block, builder.mul(builder.and_(index, _I64(1)), _I64(LANES)))
    raw = _load(builder, builder.add(at, _I64(2)), lanes_of(_I8))
    value = builder.sitofp(builder.sext(raw, lanes_of(_I32)), _VECTOR)
    scale = emit_widen_f16(builder, spread(builder, _load(builder, block, _F16)))
    return builder.fmul(value, scale)


#: How 16 values of a row are loaded, by the type of the cache.
_VALUES = {"f32": _floats, "f16": _halves, "q8_0": _bytes}


def products(kind: str, queries: int) -> Any:
    """A function (grid, q, q step, k, k step, index) -> grid plus the products of a vector each.

    q: the first query, floats. k: the first of CELLS / queries keys, which are of a type. index:
    which 16 values of all of them meet. The pair of query i and key j is vector i * keys + j.
    """
    grid, keys = TileType("f32", CELLS), CELLS // queries

    @intrinsic
    def meet(_typing, total, q, q_step, k, k_step, index):
        def emit(context, builder, signature, args):
            before, q, q_step, k, k_step, index = args
            left = [_floats(builder, _moved(builder, q, q_step, i), index) for i in range(queries)]
            right = [
                _VALUES[kind](builder, _moved(builder, k, k_step, j), index) for j in range(keys)
            ]

            def one(cell: int) -> ir.Value:
                pair = left[cell // keys], right[cell % keys]
                return emit_fma(builder, *pair, builder.extract_value(before, cell))

            return each(builder, grid, one)

        return grid(grid, *[types.int64] * 5), emit

    return meet


def _folded(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """The sums of 16 vectors as the lanes of one: lanes i and i + half of each, again and again."""
    size = LANES
    while size > 1:
        half, groups = size // 2, LANES // size
        numbers = [
            vector * LANES + group * size + lane
            for vector in range(2)
            for group in range(groups)
            for lane in range(half)
        ]
        low, high = (
            ir.Constant(lanes_of(_I32), [number + start for number in numbers])
            for start in (0, half)
        )
        vectors = [
            builder.fadd(builder.shuffle_vector(x, y, low), builder.shuffle_vector(x, y, high))
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        size = half
    return vectors[0]


def store_sums(queries: int) -> Any:
    """A function (grid, address, step): store the sum of every pair, a query's side by side."""
    grid, keys = TileType("f32", CELLS), CELLS // queries

    @intrinsic
    def store(_typing, total, address, step):
        def emit(context, builder, signature, args):
            cells = [builder.extract_value(args[0], cell) for cell in range(CELLS)]
            sums = _folded(builder, cells)
            for i in range(queries):
                numbers = ir.Constant(lanes_of(_I32, keys), list(range(i * keys, (i + 1) * keys)))
                part = builder.shuffle_vector(sums, sums, numbers)
                at = pointer_to(builder, _moved(builder, args[1], args[2], i), part.type)
                builder.store(part, at, align=4)
            return context.get_dummy_value()

        return types.void(grid, types.int64, types.int64), emit

    return store


def weighted(kind: str, queries: int, vectors: int) -> Any:
    """A function (grid, weights, weights step, row, index) -> grid plus weight * values of a row.

    weights: a float for the first query. index: which 16 values of the row are the first of
    `vectors` vectors. Vector j of query i is vector i * vectors + j of the grid.
    """
    grid = TileType("f32", queries * vectors)

    @intrinsic
    def add(_typing, total, weights, step, row, index):
        def emit(context, builder, signature, args):
            before, weights, step, row, index = args
            right = [
                _VALUES[kind](builder, row, builder.add(index, _I64(j))) for j in range(vectors)
            ]
            left = [
                spread(builder, _load(builder, _moved(builder, weights, step, i), _F32))
                for i in range(queries)
            ]

            def one(cell: int) -> ir.Value:
                pair = right[cell % vectors], left[cell // vectors]
                return emit_fma(builder, *pair, builder.extract_value(before, cell))

            return each(builder, grid, one)

        return grid(grid, *[types.int64] * 4), emit

    return add


def load_scaled(queries: int, vectors: int) -> Any:
    """A function (address, step, factors) -> grid: vectors of every query times its float."""
    grid = TileType("f32", queries * vectors)

    @intrinsic
    def load(_typing, address, step, factors):
        def emit(context, builder, signature, args):
            address, step, factors = args

            def one(cell: int) -> ir.Value:
                i = cell // vectors
                row = _moved(builder, address, step, i)
                factor = _load(builder, builder.add(factors, _I64(4 * i)), _F32)
                value = _floats(builder, row, _I64(cell % vectors))
                return builder.fmul(value, spread(builder, factor))

            return each(builder, grid, one)

        return grid(*[types.int64] * 3), emit

    return load


def store_grid(queries: int, vectors: int) -> Any:
    """A function (grid, address, step): store the vectors of every query side by side."""
    grid = TileType("f32", queries * vectors)

    @intrinsic
    def store(_typing, total, address, step):
        def emit(context, builder, signature, args):
            for cell in range(queries * vectors):
                row = _moved(builder, args[1], args[2], cell // vectors)
                at = builder.add(row, _I64(_BYTES * (cell % vectors)))
                value = builder.extract_value(args[0], cell)
                builder.store(value, pointer_to(builder, at, _VECTOR), align=4)
            return context.get_dummy_value()

        return types.void(grid, types.int64, types.int64), emit

    return store
