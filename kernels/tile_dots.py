"""Tiles that meet the weights of panels: products of bytes, and scales that make floats of them.

A block of 32 columns adds to a tile of floats once, from sums of whole numbers, which are exact.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .dots import emit_dot
from .intrinsics import LANES, emit_fma, emit_prefetch, f32x16, floats, ints, lanes_of, pointer_to
from .isa import isa
from .jit import intrinsic
from .tiles import AHEAD, FETCHED, at_token, each, spread_at
from .unpacking import Unpack, as_bytes, load_words, u8x64

_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = 4 * LANES


# ---- scales


def _small(signed: bool) -> Any:
    @intrinsic
    def load_small(_typing, address):
        def emit(context, builder, signature, args):
            wide = _widened(builder, args[0], signed)
            convert = builder.sitofp if signed else builder.uitofp
            return convert(wide, lanes_of(_F32))

        return f32x16(types.int64), emit

    return load_small


def _widened(builder: ir.IRBuilder, address: ir.Value, signed: bool) -> ir.Value:
    """16 bytes as int32."""
    raw = builder.load(pointer_to(builder, address, lanes_of(_I8)), align=1)
    return (builder.sext if signed else builder.zext)(raw, lanes_of(_I32))


#: 16 bytes at an address as floats.
load_unsigned, load_signed = _small(False), _small(True)


@intrinsic
def load_powers(_typing, address):
    """2 to the power of 16 bytes less 128; the two smallest, which are no normal numbers, are 0."""

    def emit(context, builder, signature, args):
        wide = _widened(builder, args[0], False)
        small = builder.icmp_signed("<", wide, ints(1))
        exponent = builder.sub(builder.select(small, ints(1), wide), ints(1))
        return builder.bitcast(builder.shl(exponent, ints(23)), lanes_of(_F32))

    return f32x16(types.int64), emit


# ---- products


@intrinsic
def dot(_typing, total, weights, x, step):
    """Every token's 4 bytes at x + token * step meet the weights, which are below 64."""

    def emit(context, builder, signature, args):
        before, weights, x, step = args

        def one(token: int) -> ir.Value:
            four = spread_at(builder, at_token(builder, x, step, token), _I32)
            sums = builder.extract_value(before, token)
            return emit_dot(builder, sums, weights, four, isa().name, signed=False)

        return each(builder, total, one)

    return total(total, u8x64, types.int64, types.int64), emit


def block_dots(
    unpack: Unpack, groups: range = range(8), signed: bool = False, fetches: bool = True
) -> Any:
    """A function (tile, weights, x, step) -> tile: groups of a block meet 4 bytes each of x.

    weights: address of the block's vectors; with `fetches` those that come AHEAD bytes later are
    asked for. x: the first token's 32 bytes. signed: weights that `emit_dot` calls so.
    """

    @intrinsic
    def dots(_typing, total, weights, x, step):
        def emit(context, builder, signature, args):
            before, weights, x, step = args
            sums = [builder.extract_value(before, token) for token in range(total.tokens)]

            def load(index: int) -> ir.Value:
                at = builder.add(weights, _I64(_VECTOR * index))
                if fetches and total.tokens <= FETCHED:
                    emit_prefetch(builder, builder.add(at, _I64(AHEAD)))
                return load_words(builder, at)

            for group, words in unpack(builder, load):
                if group in groups:
                    row = builder.add(x, _I64(4 * group))
                    for token, before in enumerate(sums):
                        four = spread_at(builder, at_token(builder, row, step, token), _I32)
                        vector = as_bytes(builder, words)
                        sums[token] = emit_dot(builder, before, vector, four, isa().name, signed)
            return each(builder, total, sums.__getitem__)

        return total(total, types.int64, types.int64, types.int64), emit

    return dots


# ---- from integers to floats


@intrinsic
def weighed(_typing, a, a_scales, b, b_scales):
    """a * a_scales + b * b_scales in integers: two tiles, and two addresses of 16 signed bytes."""

    def emit(context, builder, signature, args):
        a_tile, a_address, b_tile, b_address = args
        scales = [_widened(builder, address, True) for address in (a_address, b_address)]

        def one(token: int) -> ir.Value:
            return _weighed(
                builder,
                [builder.extract_value(tile, token) for tile in (a_tile, b_tile)],
                scales,
            )

        return each(builder, a, one)

    return a(a, types.int64, b, types.int64), emit


def _weighed(builder: ir.IRBuilder, pair: list[ir.Value], scales: list[ir.Value]) -> ir.Value:
    """The sum of the products of two pairs of vectors."""
    first, second = (builder.mul(*both) for both in zip(pair, scales, strict=True))
    return builder.add(first, second)


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
                record = at_token(builder, x, step, token)
                value = builder.sitofp(builder.extract_value(ints_value, token), lanes_of(_F32))
                if offset:
                    x_sum = spread_at(builder, builder.add(record, _I64(4)), _F32)
                    value = emit_fma(builder, x_sum, floats(offset), value)
                factor = builder.fmul(scales, spread_at(builder, record, _F32))
                return emit_fma(builder, value, factor, builder.extract_value(before, token))

            return each(builder, total, one)

        return total(total, ints, f32x16, types.int64, types.int64), emit

    return add


def _affine(sign: int) -> Any:
    @intrinsic
    def add(_typing, total, ints, scales, mins, x, step):
        def emit(context, builder, signature, args):
            before, ints_value, scales, mins, x, step = args
            mins = mins if sign > 0 else builder.fneg(mins)

            def one(token: int) -> ir.Value:
                record = at_token(builder, x, step, token)
                value = builder.sitofp(builder.extract_value(ints_value, token), lanes_of(_F32))
                x_sum = spread_at(builder, builder.add(record, _I64(4)), _F32)
                value = emit_fma(builder, mins, x_sum, builder.fmul(scales, value))
                scale = spread_at(builder, record, _F32)
                return emit_fma(builder, value, scale, builder.extract_value(before, token))

            return each(builder, total, one)

        return total(total, ints, f32x16, f32x16, types.int64, types.int64), emit

    return add


#: total + (ints * scales plus or minus mins * sum) * scale, x as in `add_products`.
add_shifted, add_affine = _affine(1), _affine(-1)


@intrinsic
def add_halves(_typing, total, a, b, nibbles, d, dmin, x, step):
    """total + (d * (a * scale + b * scale) + dmin * (a's sum * min + b's sum * min)) * scale of x.

    a, b: integer tiles, the halves of a block. nibbles: address of 16 bytes for each of them, with
    scales in the low nibbles and mins in the high ones. x as in `add_products`; the sums are those
    that its record has, times -32.
    """

    def emit(context, builder, signature, args):
        before, a_tile, b_tile, nibbles, d, dmin, x, step = args
        both = [_widened(builder, builder.add(nibbles, _I64(LANES * i)), False) for i in (0, 1)]
        scales = [builder.and_(part, ints(15)) for part in both]
        mins = [builder.lshr(part, ints(4)) for part in both]

        def one(token: int) -> ir.Value:
            record = at_token(builder, x, step, token)
            pair = [builder.extract_value(tile, token) for tile in (a_tile, b_tile)]
            sums = [spread_at(builder, builder.add(record, _I64(8 + 4 * i)), _I32) for i in (0, 1)]
            value, least = (
                builder.sitofp(_weighed(builder, *parts), lanes_of(_F32))
                for parts in ((pair, scales), (sums, mins))
            )
            value = emit_fma(builder, dmin, least, builder.fmul(d, value))
            scale = spread_at(builder, record, _F32)
            return emit_fma(builder, value, scale, builder.extract_value(before, token))

        return each(builder, total, one)

    kinds = (total, a, b, types.int64, f32x16, f32x16, types.int64, types.int64)
    return total(*kinds), emit
