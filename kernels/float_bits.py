"""Floats taken apart: exponents and mantissas of 16 lanes, for the functions of `elementary.py`."""

from __future__ import annotations

from llvmlite import ir

from .intrinsics import f32x16, ints, lanes_of
from .jit import intrinsic

_I32, _F32 = ir.IntType(32), ir.FloatType()


@intrinsic
def scale_by_power(_typing, vector, power):
    """vector * 2**n, n from -126 to 127, where power is n + 1.5 * 2**23: n in its lowest bits."""

    def emit(context, builder, signature, args):
        bits = builder.shl(builder.bitcast(args[1], lanes_of(_I32)), ints(23))
        factor = builder.bitcast(builder.add(bits, ints(127 << 23)), lanes_of(_F32))
        return builder.fmul(args[0], factor)

    return f32x16(f32x16, f32x16), emit


def _of_bits(part):
    @intrinsic
    def function(_typing, vector):
        def emit(context, builder, signature, args):
            return part(builder, builder.bitcast(args[0], lanes_of(_I32)))

        return f32x16(f32x16), emit

    return function


#: The exponent e and the mantissa m in [0.5, 1) of positive numbers x = m 2**e.
exponent = _of_bits(
    lambda builder, x: builder.sitofp(
        builder.sub(builder.lshr(x, ints(23)), ints(126)), lanes_of(_F32)
    )
)
mantissa = _of_bits(
    lambda builder, x: builder.bitcast(
        builder.or_(builder.and_(x, ints(0x007FFFFF)), ints(0x3F000000)), lanes_of(_F32)
    )
)
