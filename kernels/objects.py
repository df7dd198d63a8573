"""Compiled kernels: kept on disk as object code, loaded without importing Numba.

The folder's name is a hash of the kernel sources, the versions of Python, Numba and llvmlite, the
operating system and the processor's features; so what is found in it fits, and an edited kernel is
compiled anew. `cache.py` describes the folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from . import op
from .cache import ObjectFolder
from .interrupts import held_back
from .isa import isa
from .libraries import release_library
from .table import SYMBOL

_PACKAGE = op.__name__.rpartition(".")[0]

_lock = threading.Lock()
_loaded: dict[tuple[str, str], int] = {}
_spent: list[float] = []

Notice = Callable[[str], None]
#: Told the kernels that are compiled, and how many have to be.
Progress = Callable[[int, int], None]


def addresses(
    kernels: Iterable[tuple[str, str]], notice: Notice, progress: Progress | None = None
) -> dict[str, int]:
    """Addresses of kernels given as (name, module), compiled where the folder lacks them.

    `notice` is told once when something has to be compiled, or cannot be kept. The folder keeps
    only the kernels of this package, whose sources it is named after; others are compiled once a
    process.
    """
    with _lock:
        asked = list(dict.fromkeys(kernels))
        wanted = [kernel for kernel in asked if kernel not in _loaded]
        for kernel, code in _codes(wanted, notice, progress).items():
            with held_back():
                _loaded[kernel] = _load(code)
        if wanted:
            # What loads kernels is tens of megabytes, and is not needed any more.
            release_library("libllvmlite")
        return {kernel[0]: _loaded[kernel] for kernel in asked}


def warm_up(notice: Notice, progress: Progress | None = None) -> tuple[Path, int]:
    """Compile every kernel that the folder lacks; returns the folder, and how many it then holds.

    Raises InvalidInput when they cannot be kept.
    """
    from .jit import all_kernels

    kernels = all_kernels()
    with _lock:
        _codes(kernels, notice, progress, needed=True)
    return _folder().path, len(kernels)


def compile_seconds() -> float:
    """Seconds this process has spent on compiling."""
    return sum(_spent)


def _codes(
    kernels: list[tuple[str, str]],
    notice: Notice,
    progress: Progress | None,
    needed: bool = False,
) -> dict[tuple[str, str], bytes]:
    """Object code of kernels: what the folder holds, and what is compiled for it now.

    Raises InvalidInput when that cannot be kept and `needed` says that it has to be.
    """
    folder = _folder()
    found = {kernel: folder.read(kernel[0]) if _kept(kernel[1]) else None for kernel in kernels}
    missing = [kernel for kernel, code in found.items() if code is None]
    if any(_kept(module) for _, module in missing):
        with folder.writing(lambda: notice("waiting for another keelback to compile the kernels")):
            # Another process may have written them while this one waited.
            found.update({kernel: folder.read(kernel[0]) for kernel in missing if _kept(kernel[1])})
            missing = [kernel for kernel, code in found.items() if code is None]
            found.update(_compiled(missing, notice, progress, needed))
    elif missing:
        found.update(_compiled(missing, notice, progress))
    return {kernel: code for kernel, code in found.items() if code is not None}


def _compiled(
    missing: list[tuple[str, str]],
    notice: Notice,
    progress: Progress | None,
    needed: bool = False,
) -> dict[tuple[str, str], bytes]:
    """Compile kernels and keep them; a folder that cannot be written to costs the time again."""
    if not missing:
        return {}
    folder, began, codes = _folder(), time.perf_counter(), {}
    folder.check(needed)
    notice(f"compiling {len(missing)} kernels for this processor, once")
    # Most starts compile nothing, and importing what starts processes takes time.
    from .crew import compile_kernels

    if progress is not None:
        progress(0, len(missing))
    with contextlib.closing(compile_kernels(missing)) as done:
        for (name, module), code in done:
            codes[name, module] = code
            if _kept(module):
                folder.write(name, code)
                folder.check(needed)
            if progress is not None:
                progress(len(codes), len(missing))
    folder.tell(notice)
    _spent.append(time.perf_counter() - began)
    return codes


@cache
def _folder() -> ObjectFolder:
    return ObjectFolder(key())


@cache
def key() -> str:
    """Names what compiled kernels depend on: their sources, the compiler, and this machine."""
    import llvmlite.binding as llvm

    digest = hashlib.sha256()
    folder = Path(op.__file__).parent
    for source in sorted(folder.rglob("*.py")):
        name = source.relative_to(folder).as_posix()
        digest.update(name.encode() + b"\0" + source.read_bytes() + b"\0")
    compiler = [f"{name}={value}" for name, value in sorted(os.environ.items()) if "NUMBA" in name]
    facts = [
        *(sys.version, _version("numba"), _version("llvmlite"), *compiler),
        *(platform.system(), platform.machine(), llvm.get_host_cpu_name()),
        *(llvm.get_host_cpu_features().flatten(), isa().name),
    ]
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:24]


def _version(package: str) -> str:
    """What names a package's version: read from its folder, for it takes long to import."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed")
    return Path(spec.origin).with_name("_version.py").read_text("utf-8")


def _kept(module: str) -> bool:
    """Whether the folder keeps a module's kernels."""
    return module.startswith(f"{_PACKAGE}.")


def _load(code: bytes) -> int:
    """Load object code into this process; it stays for the process's life."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    # Workers may still be in its code when the interpreter has ended and clears its modules.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
    return engine.get_function_address(SYMBOL)


def callable_kernel(address: int) -> Callable[[int, int, int, int], None]:
    """A kernel as a Python function; it runs without the interpreter's lock."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(address)
