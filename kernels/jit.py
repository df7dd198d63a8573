"""The one module that meets Numba: decorators for kernels, and their compilation to object code.

A kernel has the form `f(op, context, thread, threads)`, four int64, and returns nothing; `op` and
`context` are addresses of records described in `table.py`. It is compiled without Python wrappers
and without reference counts, so that its object code needs nothing but itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import extending, types
from numba.core.compiler_lock import global_compiler_lock

from .isa import isa
from .table import SYMBOL

# Their own annotations describe what is compiled, not what a caller passes.
intrinsic: Any = extending.intrinsic
overload: Any = extending.overload

SIGNATURE = types.void(types.int64, types.int64, types.int64, types.int64)

# No fast-math: a sum keeps the order in which it is written, whatever the number of rows.
_OPTIONS: dict[str, Any] = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "_nrt": False,
}
_KERNELS: dict[str, Callable[..., None]] = {}


def kernel(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a kernel as `<op>` or `<op>.<variant>`; it is compiled when it is needed."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _KERNELS[name] = function
        return function

    return register


def all_kernels() -> list[tuple[str, str]]:
    """Every kernel of this package as (name, module)."""
    for file in sorted(Path(__file__).parent.glob("*_cpu.py")):
        importlib.import_module(f".{file.stem}", __package__)
    return sorted(
        (name, function.__module__)
        for name, function in _KERNELS.items()
        if function.__module__.rpartition(".")[0] == __package__
    )


def inline(function: Callable[..., Any]) -> Any:
    """A helper that kernels call; LLVM inlines it."""
    return numba.njit(forceinline=True, **_OPTIONS)(function)


@intrinsic
def stand_alone(_typing):
    """Say at the start of a helper that LLVM is to leave it a function: for large ones."""

    def emit(context, builder, signature, args):
        builder.function.attributes.discard("alwaysinline")
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), emit


def outlined(function: Callable[..., Any]) -> Any:
    """A helper that kernels call, and that calls `stand_alone`."""
    return numba.njit(**_OPTIONS)(function)


def compile_kernel(name: str, module: str) -> bytes:
    """Compile a kernel of the module (`keelback.kernels.conv_cpu`, say) to object code.

    The object defines SYMBOL as a C function of four int64. Raises KeyError for an unknown kernel.
    """
    settings: Any = numba.config
    settings.CPU_NAME, settings.CPU_FEATURES = isa().cpu, isa().features
    importlib.import_module(module)
    with global_compiler_lock:
        compiled: Any = numba.njit(SIGNATURE, **_OPTIONS)(_KERNELS[name]).overloads[SIGNATURE.args]
        library = compiled.target_context.codegen().create_library(name)
        library.enable_object_caching()
        library.add_ir_module(_entry_point(library, compiled))
        library.add_linking_library(compiled.library)
        library.finalize()
        return library._get_compiled_object()


def _entry_point(library: Any, compiled: Any) -> ir.Module:
    """A C function that calls the compiled one in Numba's own calling convention."""
    module = library.create_ir_module(SYMBOL)
    convention, described = compiled.target_context.call_conv, compiled.fndesc
    callee_type = convention.get_function_type(described.restype, described.argtypes)
    callee = ir.Function(module, callee_type, described.llvm_func_name)
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4), SYMBOL)
    builder = ir.IRBuilder(entry.append_basic_block())
    convention.call_function(builder, callee, described.restype, described.argtypes, entry.args)
    builder.ret_void()
    return module
