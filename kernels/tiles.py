"""Tiles: one vector of 16 lanes for each of several tokens, and the dot product of bytes.

A tile is what keeps a weight in a register while it meets several tokens. Its number of tokens is
part of its type, so the same kernel source gives the product with one token and with eight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from .dots import emit_dot
from .intrinsics import (
    LANES,
    call_llvm,
    emit_fma,
    f32x16,
    first_lanes,
    fold,
    pointer_to,
)
from .isa import isa
from .jit import intrinsic

_I8, _I16, _I32, _I64, _F32 = (
    ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(),
)  # fmt: skip
_BYTES = 4 * LANES


class BytesType(types.Type):
    """64 bytes in a vector register: 4 consecutive weights of 16 rows."""

    def __init__(self) -> None:
        super().__init__("u8x64")


class TileType(types.Type):
    """`tokens` vectors of 16 numbers, "f32" or "i32"."""

    def __init__(self, kind: str, tokens: int) -> None:
        super().__init__(f"{kind}x16x{tokens}")
        self.kind, self.tokens = kind, tokens


u8x64 = BytesType()


@register_model(BytesType)
class _BytesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(_I8, _BYTES))


@register_model(TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        element = _F32 if kind.kind == "f32" else _I32
        super().__init__(manager, kind, ir.ArrayType(ir.VectorType(element, LANES), kind.tokens))


def _vector(element: ir.Type, count: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, count)


def _constant(element: ir.Type, value: Any, count: int = LANES) -> ir.Constant:
    return ir.Constant(_vector(element, count), [value] * count)


def spread(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """16 copies of a scalar."""
    undefined = ir.Constant(_vector(value.type), ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_vector(_I32), None))


def _spread_at(builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    return spread(builder, builder.load(pointer_to(builder, address, element), align=4))


def _at(builder: ir.IRBuilder, address: ir.Value, step: ir.Value, token: int) -> ir.Value:
    """Where a token's data lies."""
    return builder.add(address, builder.mul(step, _I64(token))) if token else address


def each(builder: ir.IRBuilder, tile: TileType, make: Callable[[int], ir.Value]) -> ir.Value:
    """A tile of one vector a token."""
    element = _F32 if tile.kind == "f32" else _I32
    value = ir.Constant(ir.ArrayType(_vector(element), tile.tokens), ir.Undefined)
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
    return _filled("f32", tokens, _constant(_F32, 0.0))


def no_ints(tokens: int) -> Any:
    """A function that makes an integer tile of zeros."""
    return _filled("i32", tokens, _constant(_I32, 0))


def spread_ints(tokens: int) -> Any:
    """A function that makes an integer tile of one number a token: (address, step) -> tile."""
    tile = TileType("i32", tokens)

    @intrinsic
    def make(_typing, address, step):
        def emit(context, builder, signature, args):
            address, step = args

            def one(token: int) -> ir.Value:
                return _spread_at(builder, _at(builder, address, step, token), _I32)

            return each(builder, tile, one)

        return tile(types.int64, types.int64), emit

    return make


# ---- bytes


@intrinsic
def load_bytes(_typing, address):
    """64 bytes."""

    def emit(context, builder, signature, args):
        return builder.load(pointer_to(builder, args[0], _vector(_I8, _BYTES)), align=1)

    return u8x64(types.int64), emit


def _bits(make: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    """An intrinsic on bytes that works on whole words, whose shifts every processor has."""

    @intrinsic
    def function(_typing, vector):
        def emit(context, builder, signature, args):
            words = builder.bitcast(args[0], _vector(_I32))
            return builder.bitcast(make(builder, words), _vector(_I8, _BYTES))

        return u8x64(u8x64), emit

    return function


def _every(byte: int) -> ir.Constant:
    return _constant(_I32, byte * 0x01010101)


low_nibbles = _bits(lambda builder, words: builder.and_(words, _every(0x0F)))
high_nibbles = _bits(
    lambda builder, words: builder.and_(builder.lshr(words, _constant(_I32, 4)), _every(0x0F))
)


six_bits = _bits(lambda builder, words: builder.and_(words, _every(0x3F)))


@intrinsic
def top_bits(_typing, a, b, c):
    """Six bits of each byte: the top two of a, above them those of b, above them those of c."""

    def emit(context, builder, signature, args):
        found = None
        for vector, down, mask in zip(args, (6, 4, 2), (0x03, 0x0C, 0x30), strict=True):
            words = builder.bitcast(vector, _vector(_I32))
            part = builder.and_(builder.lshr(words, _constant(_I32, down)), _every(mask))
            found = part if found is None else builder.or_(found, part)
        return builder.bitcast(found, _vector(_I8, _BYTES))

    return u8x64(u8x64, u8x64, u8x64), emit


@intrinsic
def load_small(_typing, address):
    """16 unsigned bytes as floats."""

    def emit(context, builder, signature, args):
        raw = builder.load(pointer_to(builder, args[0], _vector(_I8)), align=1)
        return builder.uitofp(builder.zext(raw, _vector(_I32)), _vector(_F32))

    return f32x16(types.int64), emit


# ---- products


def _dot(signed: bool) -> Any:
    @intrinsic
    def dot(_typing, total, weights, x, step):
        def emit(context, builder, signature, args):
            before, weights, x, step = args
            return each(
                builder, total,
                lambda token: emit_dot(
                    builder, builder.extract_value(before, token), weights,
                    _spread_at(builder, _at(builder, x, step, token), _I32), isa().name, signed,
                ),
            )  # fmt: skip

        return total(total, u8x64, types.int64, types.int64), emit

    return dot


#: (tile, weights, x, step) -> tile: every token's 4 bytes at x + token * step meet the weights.
dot, dot_signed = _dot(False), _dot(True)


# ---- from integers to floats


@intrinsic
def weighed(_typing, a, a_scales, b, b_scales):
    """a * a_scales + b * b_scales in integers: two tiles, and two addresses of 16 signed bytes."""

    def emit(context, builder, signature, args):
        a_tile, a_address, b_tile, b_address = args
        scales = [
            builder.sext(
                builder.load(pointer_to(builder, address, _vector(_I8)), align=1), _vector(_I32)
            )
            for address in (a_address, b_address)
        ]
        return each(
            builder, a,
            lambda token: builder.add(
                builder.mul(builder.extract_value(a_tile, token), scales[0]),
                builder.mul(builder.extract_value(b_tile, token), scales[1]),
            ),
        )  # fmt: skip

    return a(a, types.int64, b, types.int64), emit


def add_products(offset: int) -> Any:
    """A function: total + (ints + offset * sum) * scales * scale, exact up to the last products.

    x: address of the first token's block record, which begins with the scale and the sum of the
    block's bytes, both float32; step: bytes from one token's to the next one's.
    """

    @intrinsic
    def add(_typing, total, ints, scales, x, step):
        def emit(context, builder, signature, args):
            before, ints_value, scales, x, step = args

            def one(token: int) -> ir.Value:
                record = _at(builder, x, step, token)
                value = builder.sitofp(builder.extract_value(ints_value, token), _vector(_F32))
                if offset:
                    x_sum = _spread_at(builder, builder.add(record, _I64(4)), _F32)
                    value = emit_fma(builder, x_sum, _constant(_F32, float(offset)), value)
                factor = builder.fmul(scales, _spread_at(builder, record, _F32))
                return emit_fma(builder, value, factor, builder.extract_value(before, token))

            return each(builder, total, one)

        return total(total, ints, f32x16, types.int64, types.int64), emit

    return add


@intrinsic
def add_affine(_typing, total, ints, scales, mins, x, step):
    """total + (ints * scales - mins * sum) * scale, x as in `add_products`."""

    def emit(context, builder, signature, args):
        before, ints_value, scales, mins, x, step = args
        negated = builder.fneg(mins)

        def one(token: int) -> ir.Value:
            record = _at(builder, x, step, token)
            value = builder.sitofp(builder.extract_value(ints_value, token), _vector(_F32))
            x_sum = _spread_at(builder, builder.add(record, _I64(4)), _F32)
            value = emit_fma(builder, negated, x_sum, builder.fmul(scales, value))
            scale = _spread_at(builder, record, _F32)
            return emit_fma(builder, value, scale, builder.extract_value(before, token))

        return each(builder, total, one)

    return total(total, ints, f32x16, f32x16, types.int64, types.int64), emit


@intrinsic
def store_tile(_typing, tile, bias, address, step, lanes):
    """Store the first `lanes` lanes of every token's vector, plus a bias, `step` bytes apart."""

    def emit(context, builder, signature, args):
        value, bias, address, step, lanes = args
        whole = builder.icmp_signed("==", lanes, _I64(LANES))
        mask = first_lanes(builder, lanes)
        for token in range(tile.tokens):
            vector = builder.fadd(builder.extract_value(value, token), bias)
            pointer = pointer_to(builder, _at(builder, address, step, token), vector.type)
            with builder.if_else(whole) as (then, otherwise):
                with then:
                    builder.store(vector, pointer, align=1)
                with otherwise:
                    call_llvm(
                        builder, "llvm.masked.store.v16f32.p0", ir.VoidType(),
                        vector, pointer, _I32(1), mask,
                    )  # fmt: skip
        return context.get_dummy_value()

    return types.void(tile, f32x16, types.int64, types.int64, types.int64), emit


# ---- rows: columns in lanes, and a sum across them at the end


@intrinsic
def fma_rows(_typing, total, weights, x, step):
    """total + weights * 16 floats of every token, at x + token * step."""

    def emit(context, builder, signature, args):
        before, weights, x, step = args

        def one(token: int) -> ir.Value:
            pointer = pointer_to(builder, _at(builder, x, step, token), _vector(_F32))
            values = builder.load(pointer, align=1)
            return emit_fma(builder, weights, values, builder.extract_value(before, token))

        return each(builder, total, one)

    return total(total, f32x16, types.int64, types.int64), emit


@intrinsic
def fma_rows_first(_typing, total, weights, x, step, lanes):
    """`fma_rows` for the first `lanes` lanes."""

    def emit(context, builder, signature, args):
        before, weights, x, step, lanes = args
        mask, zero = first_lanes(builder, lanes), _constant(_F32, 0.0)

        def one(token: int) -> ir.Value:
            pointer = pointer_to(builder, _at(builder, x, step, token), _vector(_F32))
            values = call_llvm(
                builder, "llvm.masked.load.v16f32.p0", zero.type, pointer, _I32(1), mask, zero
            )
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
            target = pointer_to(builder, _at(builder, address, step, token), _F32)
            builder.store(builder.fadd(value, bias), target, align=4)
        return context.get_dummy_value()

    return types.void(total, types.float32, types.int64, types.int64), emit
