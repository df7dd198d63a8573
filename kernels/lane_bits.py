"""What encoders need beside the arithmetic of lanes: roots, halves, powers of two, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types

from .halves import emit_widen_f16, narrow_f16
from .intrinsics import call_llvm, f32x16, floats, ints, lanes_of, lanewise, pointer_to
from .jit import intrinsic

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_F32 = ir.FloatType()


floor = lanewise(lambda builder, x: call_llvm(builder, "llvm.floor.v16f32", x.type, x), 1)
root = lanewise(lambda builder, x: call_llvm(builder, "llvm.sqrt.v16f32", x.type, x), 1)

#: The nearest number that a half can hold.
as_half = lanewise(lambda builder, x: emit_widen_f16(builder, narrow_f16(builder, x)), 1)

#: The 16 bits of the nearest half, as a whole number from 0 to 65535.
half_bits = lanewise(
    lambda builder, x: builder.uitofp(
        builder.bitcast(narrow_f16(builder, x), lanes_of(_I16)), lanes_of(_F32)
    ),
    1,
)

#: The largest power of two that is no larger than a positive normal number.
power_below = lanewise(
    lambda builder, x: builder.bitcast(
        builder.and_(builder.bitcast(x, lanes_of(_I32)), ints(0x7F800000)), lanes_of(_F32)
    ),
    1,
)


@intrinsic
def store_low_bytes(_typing, address, vector):
    """Store the lowest byte of 16 whole numbers, whose magnitude is below 2**31."""

    def emit(context, builder, signature, args):
        narrow = builder.trunc(builder.fptosi(args[1], lanes_of(_I32)), lanes_of(_I8))
        builder.store(narrow, pointer_to(builder, args[0], narrow.type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, f32x16), emit


def stairs(first: float, edges: Sequence[float], heights: Sequence[float]) -> Any:
    """An intrinsic: `first`, and the height of every stair whose edge a lane is beyond."""

    @intrinsic
    def climb(_typing, vector):
        def emit(context, builder, signature, args):
            total, flat = floats(first), floats(0.0)
            for edge, height in zip(edges, heights, strict=True):
                beyond = builder.fcmp_ordered(">", args[0], floats(edge))
                total = builder.fadd(total, builder.select(beyond, floats(height), flat))
            return total

        return f32x16(f32x16), emit

    return climb
