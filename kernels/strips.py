"""Strips: adjacent vectors of 16 floats that go through the same steps, as columns of a state do.

One vector alone would wait for each of its sums; several side by side keep the processor busy, and
share the numbers they are multiplied by.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from .intrinsics import LANES, call_llvm, emit_fma, f32x16, ints, lanes_of, spread
from .jit import intrinsic
from .tiles import TileType, each

_F32, _I32 = ir.FloatType(), ir.IntType(32)
_VECTOR = ir.VectorType(_F32, LANES)


@intrinsic
def scaled(_typing, strip, factor):
    """strip * factor, a float32."""

    def emit(context, builder, signature, args):
        factor = spread(builder, args[1])
        return each(
            builder, strip, lambda i: builder.fmul(builder.extract_value(args[0], i), factor)
        )

    return strip(strip, types.float32), emit


@intrinsic
def minus(_typing, a, b):
    """a - b."""

    def emit(context, builder, signature, args):
        def one(index: int) -> ir.Value:
            return builder.fsub(*(builder.extract_value(arg, index) for arg in args))

        return each(builder, a, one)

    return a(a, b), emit


@intrinsic
def product(_typing, a, b):
    """a * b."""

    def emit(context, builder, signature, args):
        def one(index: int) -> ir.Value:
            return builder.fmul(*(builder.extract_value(arg, index) for arg in args))

        return each(builder, a, one)

    return a(a, b), emit


@intrinsic
def larger_magnitude(_typing, a, b):
    """The larger of a, which is not negative, and the magnitude of b; NaN where either is NaN."""

    def emit(context, builder, signature, args):
        def one(index: int) -> ir.Value:
            known, value = (
                builder.bitcast(builder.extract_value(arg, index), lanes_of(_I32)) for arg in args
            )
            # Bits of what is not negative are ordered as the numbers are, NaN last.
            magnitude = builder.and_(value, ints(0x7FFFFFFF))
            found = call_llvm(builder, "llvm.smax.v16i32", known.type, known, magnitude)
            return builder.bitcast(found, _VECTOR)

        return each(builder, a, one)

    return a(a, b), emit


@intrinsic
def fraction_of(_typing, number, strip, least):
    """number / strip, and 0 where the strip is not at least `least`."""

    def emit(context, builder, signature, args):
        above, least = spread(builder, args[0]), spread(builder, args[2])

        def one(index: int) -> ir.Value:
            value = builder.extract_value(args[1], index)
            enough = builder.fcmp_ordered(">=", value, least)
            return builder.select(enough, builder.fdiv(above, value), ir.Constant(_VECTOR, None))

        return each(builder, strip, one)

    return strip(types.float32, strip, types.float32), emit


@intrinsic
def plus_scaled(_typing, total, strip, factor):
    """total + strip * factor, a float32."""

    def emit(context, builder, signature, args):
        before, strip_value, factor = args
        factor = spread(builder, factor)

        def one(index: int) -> ir.Value:
            value = builder.extract_value(strip_value, index)
            return emit_fma(builder, value, factor, builder.extract_value(before, index))

        return each(builder, total, one)

    return total(total, strip, types.float32), emit


@intrinsic
def as_strip(_typing, vector):
    """A strip of one vector."""
    strip = TileType("f32", 1)
    return strip(f32x16), lambda context, builder, signature, args: each(
        builder, strip, lambda _: args[0]
    )


@intrinsic
def vector_of(_typing, strip):
    """The first vector of a strip."""
    return f32x16(strip), lambda context, builder, signature, args: builder.extract_value(
        args[0], 0
    )


@intrinsic
def first_lane(_typing, vector):
    """The first number of a vector."""
    zero = _I32(0)
    return types.float32(f32x16), lambda context, builder, signature, args: builder.extract_element(
        args[0], zero
    )
