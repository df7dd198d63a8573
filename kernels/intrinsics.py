"""What kernels are written with: addresses as pointers, and vectors of 16 floats.

Every intrinsic emits a few LLVM instructions. Vector loads and stores take a number of lanes, so
that the tail of a row goes through the same instructions as its body and comes to the same bits.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from .isa import isa
from .jit import inline, intrinsic, overload

LANES = 16
#: Bytes of a cache line.
LINE = 64

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()


class VectorType(types.Type):
    """16 float32 values in a vector register."""

    def __init__(self) -> None:
        super().__init__("f32x16")


f32x16 = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, lanes_of(_F32))


def lanes_of(element: ir.Type, count: int = LANES) -> ir.VectorType:
    """The type of a vector of 16."""
    return ir.VectorType(element, count)


def ints(value: int) -> ir.Constant:
    """16 copies of a whole number."""
    return ir.Constant(lanes_of(_I32), [value] * LANES)


def floats(value: float) -> ir.Constant:
    """16 copies of a float32."""
    return ir.Constant(lanes_of(_F32), [value] * LANES)


def spread(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """16 copies of a scalar."""
    undefined = ir.Constant(lanes_of(value.type), ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(lanes_of(_I32), None))


def call_llvm(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic or a C function by name."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def pointer_to(builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    """An address, an int64, as a pointer."""
    return builder.inttoptr(address, element.as_pointer())


# ---- scalars at an address: `f32(address)[i]`


def _view(numba_type, element):
    @intrinsic
    def view(_typing, address):
        def emit(context, builder, signature, args):
            return pointer_to(builder, args[0], element)

        return types.CPointer(numba_type)(types.int64), emit

    return view


f32, i64, i32, i16, i8, f64 = (
    _view(kind, element)
    for kind, element in (
        (types.float32, _F32), (types.int64, _I64), (types.int32, _I32),
        (types.int16, _I16), (types.int8, _I8),
        (types.float64, _F64),
    )
)  # fmt: skip


# ---- vectors


@intrinsic
def prefetch(_typing, address):
    """Ask for the cache line at an address, which need not be mapped."""

    def emit(context, builder, signature, args):
        emit_prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), emit


def emit_prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """To read, to be kept in every cache, data."""
    flags = _I32(0), _I32(3), _I32(1)
    pointer = pointer_to(builder, address, _I8)
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *flags)


@inline
def fetch(address, nbytes):
    """Ask for all cache lines of `nbytes` from an address on."""
    for line in range(0, nbytes, LINE):
        prefetch(address + line)


@intrinsic
def opaque(_typing, value):
    """The same number, of which the compiler knows nothing: a loop so bounded is not unrolled."""

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(_I64, [_I64])
        return builder.asm(kind, "", "=r,0", args, side_effect=False)

    return types.int64(types.int64), emit


def first_lanes(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """A mask of the first `count` lanes."""
    numbers = ir.Constant(lanes_of(_I32), list(range(LANES)))
    return builder.icmp_signed("<", numbers, spread(builder, builder.trunc(count, _I32)))


def _name_of(element: ir.Type) -> str:
    """What LLVM calls 16 of a type in the name of a function."""
    return "v16" + {"half": "f16", "float": "f32"}.get(str(element), str(element))


def emit_load_first(
    builder: ir.IRBuilder, address: ir.Value, element: ir.Type, count: ir.Value
) -> ir.Value:
    """The first `count` of 16 elements at an address, zeros for the others."""
    vector, name = lanes_of(element), f"llvm.masked.load.{_name_of(element)}.p0"
    zero, mask = ir.Constant(vector, None), first_lanes(builder, count)
    return call_llvm(
        builder, name, vector, pointer_to(builder, address, vector), _I32(1), mask, zero
    )


def emit_store_first(
    builder: ir.IRBuilder, address: ir.Value, vector: ir.Value, count: ir.Value
) -> None:
    """Store the first `count` of 16 elements."""
    name = f"llvm.masked.store.{_name_of(vector.type.element)}.p0"
    pointer, mask = pointer_to(builder, address, vector.type), first_lanes(builder, count)
    call_llvm(builder, name, ir.VoidType(), vector, pointer, _I32(1), mask)


def loads(element, widen):
    """A full load and one of the first `count` lanes, the others zero, made floats by `widen`."""

    @intrinsic
    def load(_typing, address):
        def emit(context, builder, signature, args):
            return widen(
                builder, builder.load(pointer_to(builder, args[0], lanes_of(element)), align=1)
            )

        return f32x16(types.int64), emit

    @intrinsic
    def load_first(_typing, address, count):
        def emit(context, builder, signature, args):
            return widen(builder, emit_load_first(builder, args[0], element, args[1]))

        return f32x16(types.int64, types.int64), emit

    return load, load_first


load, load_first = loads(_F32, lambda builder, value: value)


@intrinsic
def store_first(_typing, address, vector, count):
    """Store the first `count` lanes."""

    def emit(context, builder, signature, args):
        emit_store_first(builder, *args)
        return context.get_dummy_value()

    return types.void(types.int64, f32x16, types.int64), emit


@intrinsic
def store(_typing, address, vector):
    """Store all lanes."""

    def emit(context, builder, signature, args):
        builder.store(args[1], pointer_to(builder, args[0], args[1].type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, f32x16), emit


@intrinsic
def splat(_typing, value):
    """16 copies of a float32."""

    def emit(context, builder, signature, args):
        return spread(builder, args[0])

    return f32x16(types.float32), emit


@intrinsic
def lane_numbers(_typing):
    """0 to 15."""
    numbers = ir.Constant(lanes_of(_F32), [float(lane) for lane in range(LANES)])
    return f32x16(), lambda context, builder, signature, args: numbers


def emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, rounded once; twice where the instruction set has no such instruction."""
    if isa().fma:
        return call_llvm(builder, "llvm.fma.v16f32", a.type, a, b, c)
    return builder.fadd(builder.fmul(a, b), c)


def lanewise(emit_lanes, arity):
    """An intrinsic from vectors to a vector."""
    if arity == 1:

        @intrinsic
        def function(_typing, a):
            return f32x16(f32x16), lambda context, builder, signature, args: emit_lanes(
                builder, *args
            )
    elif arity == 2:

        @intrinsic
        def function(_typing, a, b):
            return f32x16(f32x16, f32x16), lambda context, builder, signature, args: emit_lanes(
                builder, *args
            )
    else:

        @intrinsic
        def function(_typing, a, b, c):
            kind = f32x16(f32x16, f32x16, f32x16)
            return kind, lambda context, builder, signature, args: emit_lanes(builder, *args)

    return function


_add = lanewise(lambda builder, a, b: builder.fadd(a, b), 2)
_sub = lanewise(lambda builder, a, b: builder.fsub(a, b), 2)
_mul = lanewise(lambda builder, a, b: builder.fmul(a, b), 2)
_div = lanewise(lambda builder, a, b: builder.fdiv(a, b), 2)
fma = lanewise(emit_fma, 3)
absolute = lanewise(lambda builder, a: call_llvm(builder, "llvm.fabs.v16f32", a.type, a), 1)
nearest = lanewise(lambda builder, a: call_llvm(builder, "llvm.rint.v16f32", a.type, a), 1)


def _choose(comparison):
    """where(a < b, c, d) and its like; NaN makes an ordered comparison false."""

    @intrinsic
    def choose(_typing, a, b, c, d):
        def emit(context, builder, signature, args):
            return builder.select(
                builder.fcmp_ordered(comparison, args[0], args[1]), args[2], args[3]
            )

        return f32x16(f32x16, f32x16, f32x16, f32x16), emit

    return choose


where_less, where_equal = _choose("<"), _choose("==")


def _operator(symbol, function):
    @overload(symbol)
    def implement(a, b):
        if isinstance(a, VectorType) and isinstance(b, VectorType):
            return lambda a, b: function(a, b)
        if isinstance(a, VectorType) and b == types.float32:
            return lambda a, b: function(a, splat(b))
        return None


for _symbol, _function in (
    (operator.add, _add), (operator.sub, _sub), (operator.mul, _mul), (operator.truediv, _div),
):  # fmt: skip
    _operator(_symbol, _function)


def fold(builder: ir.IRBuilder, vector: ir.Value, combine) -> ir.Value:
    """Combine lanes i and i + half, again and again: a tree whose shape never changes."""
    count = LANES
    while count > 1:
        count //= 2
        low, high = (
            builder.shuffle_vector(
                vector,
                vector,
                ir.Constant(lanes_of(_I32, count), list(range(start, start + count))),
            )
            for start in (0, count)
        )
        vector = combine(low, high)
    return builder.extract_element(vector, _I32(0))


def _maximum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The larger one of each lane; NaN where either is NaN."""
    return call_llvm(builder, f"llvm.maximum.v{a.type.count}f32", a.type, a, b)


maximum = lanewise(_maximum, 2)


def _reduction(combine):
    @intrinsic
    def reduce(_typing, vector):
        def emit(context, builder, signature, args):
            return fold(builder, args[0], partial(combine, builder))

        return types.float32(f32x16), emit

    return reduce


sum_lanes = _reduction(lambda builder, a, b: builder.fadd(a, b))
max_lanes = _reduction(_maximum)


@intrinsic
def store_bytes(_typing, address, vector):
    """Round 16 floats within [-128, 127] to the nearest, ties to even, and store them as bytes."""

    def emit(context, builder, signature, args):
        rounded = call_llvm(builder, "llvm.rint.v16f32", args[1].type, args[1])
        narrow = builder.fptosi(rounded, lanes_of(_I8))
        builder.store(narrow, pointer_to(builder, args[0], narrow.type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, f32x16), emit


def stack(count: int) -> Any:
    """An intrinsic without arguments: the address of `count` floats on the thread's own stack."""

    @intrinsic
    def allocate(_typing):
        def emit(context, builder, signature, args):
            floats = cgutils.alloca_once(builder, _F32, size=_I32(count))
            return builder.ptrtoint(floats, _I64)

        return types.int64(), emit

    return allocate
