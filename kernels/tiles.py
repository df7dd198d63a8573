"""Tiles: one vector of 16 lanes for each of several tokens.

A tile is what keeps a weight in a register while it meets several tokens. Its number of tokens is
part of its type, so the same kernel source gives the product with one token and with eight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from .intrinsics import (
    LANES,
    emit_fma,
    emit_load_first,
    emit_store_first,
    f32x16,
    floats,
    fold,
    ints,
    lanes_of,
    pointer_to,
    spread,
)
from .jit import intrinsic

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()

#: Bytes between what a product reads and what it asks for.
AHEAD = 8192
#: Tokens of tiles that ask: the first ones that weights meet, when they come from memory.
FETCHED = 4


class TileType(types.Type):
    """`tokens` vectors of 16 numbers, "f32" or "i32"."""

    def __init__(self, kind: str, tokens: int) -> None:
        super().__init__(f"{kind}x16x{tokens}")
        self.kind, self.tokens = kind, tokens


@register_model(TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        element = _F32 if kind.kind == "f32" else _I32
        super().__init__(manager, kind, ir.ArrayType(lanes_of(element), kind.tokens))


def spread_at(builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    """16 copies of the number at an address."""
    return spread(builder, builder.load(pointer_to(builder, address, element), align=4))


def at_token(builder: ir.IRBuilder, address: ir.Value, step: ir.Value, token: int) -> ir.Value:
    """Where a token's data lies."""
    return builder.add(address, builder.mul(step, _I64(token))) if token else address


def each(builder: ir.IRBuilder, tile: TileType, make: Callable[[int], ir.Value]) -> ir.Value:
    """A tile of one vector a token."""
    element = _F32 if tile.kind == "f32" else _I32
    value = ir.Constant(ir.ArrayType(lanes_of(element), tile.tokens), ir.Undefined)
    for token in range(tile.tokens):
        value = builder.insert_value(value, make(token), token)
    return value


# ---- making tiles


def _filled(kind: str, tokens: int, value: ir.Constant) -> Any:
    tile = TileType(kind, tokens)

    @intrinsic
    def make(_typing):
        return tile(), lambda context, builder, signature, args: each(
            builder, tile, lambda token: value
        )

    return make


def zeros(tokens: int) -> Any:
    """A function that makes a float tile of zeros."""
    return _filled("f32", tokens, floats(0.0))


def no_ints(tokens: int) -> Any:
    """A function that makes an integer tile of zeros."""
    return _filled("i32", tokens, ints(0))


def spread_ints(tokens: int) -> Any:
    """A function that makes an integer tile of one number a token: (address, step) -> tile."""
    tile = TileType("i32", tokens)

    @intrinsic
    def make(_typing, address, step):
        def emit(context, builder, signature, args):
            address, step = args

            def one(token: int) -> ir.Value:
                return spread_at(builder, at_token(builder, address, step, token), _I32)

            return each(builder, tile, one)

        return tile(types.int64, types.int64), emit

    return make


# ---- what panels come to


@intrinsic
def store_tile(_typing, tile, bias, address, step, lanes):
    """Store the first `lanes` lanes of every token's vector, plus a bias, `step` bytes apart."""

    def emit(context, builder, signature, args):
        value, bias, address, step, lanes = args
        whole = builder.icmp_signed("==", lanes, _I64(LANES))
        for token in range(tile.tokens):
            vector = builder.fadd(builder.extract_value(value, token), bias)
            target = at_token(builder, address, step, token)
            with builder.if_else(whole) as (then, otherwise):
                with then:
                    builder.store(vector, pointer_to(builder, target, vector.type), align=1)
                with otherwise:
                    emit_store_first(builder, target, vector, lanes)
        return context.get_dummy_value()

    return types.void(tile, f32x16, types.int64, types.int64, types.int64), emit


# ---- rows: columns in lanes, and a sum across them at the end


@intrinsic
def fma_rows(_typing, total, weights, x, step):
    """total + weights * 16 floats of every token, at x + token * step."""

    def emit(context, builder, signature, args):
        before, weights, x, step = args

        def one(token: int) -> ir.Value:
            pointer = pointer_to(builder, at_token(builder, x, step, token), lanes_of(_F32))
            values = builder.load(pointer, align=1)
            return emit_fma(builder, weights, values, builder.extract_value(before, token))

        return each(builder, total, one)

    return total(total, f32x16, types.int64, types.int64), emit


@intrinsic
def fma_rows_first(_typing, total, weights, x, step, lanes):
    """`fma_rows` for the first `lanes` lanes."""

    def emit(context, builder, signature, args):
        before, weights, x, step, lanes = args

        def one(token: int) -> ir.Value:
            values = emit_load_first(builder, at_token(builder, x, step, token), _F32, lanes)
            return emit_fma(builder, weights, values, builder.extract_value(before, token))

        return each(builder, total, one)

    return total(total, f32x16, types.int64, types.int64, types.int64), emit


@intrinsic
def store_sums(_typing, total, bias, address, step):
    """Store the sum of every token's lanes, plus a bias, one float `step` bytes after another."""

    def emit(context, builder, signature, args):
        total_value, bias, address, step = args
        for token in range(total.tokens):
            value = fold(builder, builder.extract_value(total_value, token), builder.fadd)
            target = pointer_to(builder, at_token(builder, address, step, token), _F32)
            builder.store(builder.fadd(value, bias), target, align=4)
        return context.get_dummy_value()

    return types.void(total, types.float32, types.int64, types.int64), emit
