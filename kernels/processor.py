"""What the walker needs of the processor: atomics, calls by address, the floating-point mode."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .intrinsics import call_llvm, pointer_to
from .jit import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_X86 = ("x86_64", "amd64", "i686")


@intrinsic
def atomic_add(_typing, address, value):
    """Add to the int64 at an address and return what was there; acquires and releases."""

    def emit(context, builder, signature, args):
        return builder.atomic_rmw("add", pointer_to(builder, args[0], _I64), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def atomic_load(_typing, address):
    """The int64 at an address, in one order with all other atomics."""

    def emit(context, builder, signature, args):
        return builder.load_atomic(pointer_to(builder, args[0], _I64), "seq_cst", 8)

    return types.int64(types.int64), emit


@intrinsic
def atomic_exchange(_typing, address, value):
    """Put a number at an address and return what was there."""

    def emit(context, builder, signature, args):
        return builder.atomic_rmw("xchg", pointer_to(builder, args[0], _I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def pause(_typing):
    """Tell the processor that this is a spin loop."""

    def emit(context, builder, signature, args):
        if builder.module.triple.startswith(_X86):
            call_llvm(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def call_kernel(_typing, kernel, op, context, thread, threads):
    """Call the kernel at an address."""

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit


@intrinsic
def call_void(_typing, function):
    """Call the C function without arguments at an address."""

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(_I32, [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), emit


# MXCSR's bits 6 and 15: denormal numbers count as zero, coming in and going out.
_FLUSH_X86 = 0x8040


@intrinsic
def flush_denormals(_typing):
    """Treat denormals as zero in this thread; returns what `restore_denormals` needs."""

    def emit(context, builder, signature, args):
        slot = cgutils.alloca_once(builder, _I32)
        builder.store(_I32(0), slot)
        if builder.module.triple.startswith(_X86):
            call_llvm(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), slot)
            before = builder.load(slot)
            builder.store(builder.or_(before, _I32(_FLUSH_X86)), slot)
            call_llvm(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), slot)
            return builder.zext(before, _I64)
        return _I64(0)

    return types.int64(), emit


@intrinsic
def restore_denormals(_typing, before):
    """Put this thread's floating-point mode back."""

    def emit(context, builder, signature, args):
        if builder.module.triple.startswith(_X86):
            slot = cgutils.alloca_once(builder, _I32)
            builder.store(builder.trunc(args[0], _I32), slot)
            call_llvm(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), slot)
        return context.get_dummy_value()

    return types.void(types.int64), emit
