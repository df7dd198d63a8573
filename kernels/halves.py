"""Floats in 16 bits: halves and bfloat16 as floats, and floats rounded to halves."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from .intrinsics import f32x16, floats, ints, lanes_of, loads, pointer_to, spread
from .isa import isa
from .jit import intrinsic

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_F16, _F32 = ir.HalfType(), ir.FloatType()


@intrinsic
def f16_at(_typing, address):
    """The half at an address, as float32."""

    def emit(context, builder, signature, args):
        pointer = pointer_to(builder, args[0], _F16)
        if isa().f16c:
            return builder.fpext(builder.load(pointer, align=1), _F32)
        first = builder.insert_element(
            ir.Constant(lanes_of(_F16), None), builder.load(pointer, align=1), _I32(0)
        )
        return builder.extract_element(emit_widen_f16(builder, first), _I32(0))

    return types.float32(types.int64), emit


def emit_widen_f16(builder, half):
    """Halves as floats; without the instruction for it, by moving their bits."""
    if isa().f16c:
        return builder.fpext(half, lanes_of(_F32))
    bits = builder.zext(builder.bitcast(half, lanes_of(_I16)), lanes_of(_I32))
    sign = builder.shl(builder.and_(bits, ints(0x8000)), ints(16))
    magnitude = builder.and_(bits, ints(0x7FFF))
    # Another bias of the exponent; infinity's and NaN's is moved to the top.
    shifted = builder.add(builder.shl(magnitude, ints(13)), ints(112 << 23))
    huge = builder.icmp_unsigned(">=", magnitude, ints(0x7C00))
    normal = builder.select(huge, builder.add(shifted, ints(112 << 23)), shifted)
    tiny = builder.fmul(builder.sitofp(magnitude, lanes_of(_F32)), floats(2.0**-24))
    small = builder.icmp_unsigned("<", magnitude, ints(0x0400))
    value = builder.select(small, builder.bitcast(tiny, lanes_of(_I32)), normal)
    return builder.bitcast(builder.or_(value, sign), lanes_of(_F32))


def emit_widen_bf16(builder, bits):
    """The upper halves of floats, as floats."""
    wide = builder.shl(builder.zext(bits, lanes_of(_I32)), ints(16))
    return builder.bitcast(wide, lanes_of(_F32))


load_f16, load_first_f16 = loads(_F16, emit_widen_f16)
load_bf16, load_first_bf16 = loads(_I16, emit_widen_bf16)


@intrinsic
def store_halves(_typing, address, vector):
    """Store 16 floats as halves, rounded to the nearest, ties to even."""

    def emit(context, builder, signature, args):
        halves = narrow_f16(builder, args[1])
        builder.store(halves, pointer_to(builder, args[0], halves.type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, f32x16), emit


@intrinsic
def store_half(_typing, address, value):
    """Store a float as a half."""

    def emit(context, builder, signature, args):
        halves = narrow_f16(builder, spread(builder, args[1]))
        first = builder.extract_element(halves, _I32(0))
        builder.store(first, pointer_to(builder, args[0], first.type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), emit


def narrow_f16(builder, vector):
    """Floats as halves; without the instruction for it, by moving their bits."""
    if isa().f16c:
        return builder.fptrunc(vector, lanes_of(_F16))
    bits = builder.bitcast(vector, lanes_of(_I32))
    sign = builder.and_(builder.lshr(bits, ints(16)), ints(0x8000))
    magnitude = builder.and_(bits, ints(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, ints(13)), ints(1))
    # Another bias of the exponent, and what rounds the bits that fall away.
    rounded = builder.add(builder.add(magnitude, odd), ints(0xFFF - (112 << 23)))
    normal = builder.lshr(rounded, ints(13))
    # Added to a half, a number is rounded to a multiple of the least that a half can hold.
    half = floats(0.5)
    tiny = builder.fadd(builder.bitcast(magnitude, lanes_of(_F32)), half)
    tiny = builder.sub(builder.bitcast(tiny, lanes_of(_I32)), builder.bitcast(half, lanes_of(_I32)))
    value = builder.select(builder.icmp_unsigned("<", magnitude, ints(113 << 23)), tiny, normal)
    huge = builder.icmp_unsigned(">=", magnitude, ints(143 << 23))
    value = builder.select(huge, ints(0x7C00), value)
    nan = builder.icmp_unsigned(">", magnitude, ints(255 << 23))
    value = builder.select(nan, ints(0x7E00), value)
    return builder.bitcast(builder.trunc(builder.or_(value, sign), lanes_of(_I16)), lanes_of(_F16))
