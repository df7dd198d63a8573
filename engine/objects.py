"""Compiled kernels: kept on disk as object code, loaded without importing Numba.

The folder's name is a hash of the kernel sources, the versions of Python, Numba and llvmlite, the
operating system and the processor's features; so what is found in it fits, and an edited kernel is
compiled anew. Each file begins with the SHA-256 of the kernel's name and of the code behind it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..kernels import op
from ..kernels.errors import InvalidInput
from ..kernels.files import replacing
from ..kernels.table import SYMBOL
from .platform import cache_folder

_DIGEST = hashlib.sha256().digest_size
_PACKAGE = op.__name__.rpartition(".")[0]

_lock = threading.Lock()
_loaded: dict[tuple[str, str], int] = {}
_engines: list[Any] = []


def addresses(kernels: Iterable[tuple[str, str]], notice: Callable[[str], None]) -> dict[str, int]:
    """Addresses of kernels given as (name, module), compiled where the folder lacks them.

    `notice` is told once when something has to be compiled. The folder keeps only the kernels of
    this package, whose sources it is named after; others are compiled once a process.
    """
    with _lock:
        asked = list(dict.fromkeys(kernels))
        wanted = [kernel for kernel in asked if kernel not in _loaded]
        found = {kernel: _read(kernel[0]) if _kept(kernel[1]) else None for kernel in wanted}
        missing = [kernel for kernel in wanted if found[kernel] is None]
        if missing:
            notice(f"compiling {len(missing)} kernels for this processor (once, a few seconds)")
        for kernel in missing:
            found[kernel] = _compile(*kernel)
        for kernel in wanted:
            _loaded[kernel] = _load(found[kernel] or b"")
        return {kernel[0]: _loaded[kernel] for kernel in asked}


@cache
def key() -> str:
    """Names what compiled kernels depend on: their sources, the compiler, and this machine."""
    import llvmlite.binding as llvm

    digest = hashlib.sha256()
    for source in sorted(Path(op.__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    compiler = [f"{name}={value}" for name, value in sorted(os.environ.items()) if "NUMBA" in name]
    facts = [
        *(sys.version, version("numba"), version("llvmlite"), *compiler),
        *(platform.system(), platform.machine(), llvm.get_host_cpu_name()),
        llvm.get_host_cpu_features().flatten(),
    ]
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:24]


def folder() -> Path:
    """The folder that holds the object code for this key; raises OSError where there is none."""
    return cache_folder() / key()


def _read(name: str) -> bytes | None:
    """Object code of a kernel, or None where there is none or it is damaged."""
    try:
        content = (folder() / f"{name}.o").read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST], content[_DIGEST:]
    return code if _seal(name, code) == digest else None


def _seal(name: str, code: bytes) -> bytes:
    """A hash of a kernel's code and of its name, so that no file passes for another."""
    return hashlib.sha256(name.encode() + b"\0" + code).digest()


def _kept(module: str) -> bool:
    """Whether the folder keeps a module's kernels."""
    return module.startswith(f"{_PACKAGE}.")


def _compile(name: str, module: str) -> bytes:
    """Compile a kernel and keep it; a folder that cannot be written to costs the time again."""
    from ..kernels.jit import compile_kernel

    code = compile_kernel(name, module)
    if not _kept(module):
        return code
    with contextlib.suppress(OSError, InvalidInput):
        folder().mkdir(parents=True, exist_ok=True)
        with replacing(folder() / f"{name}.o") as partial:
            partial.write_bytes(_seal(name, code) + code)
    return code


def _load(code: bytes) -> int:
    """Load object code into this process; it stays for the process's life."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(SYMBOL)


def callable_kernel(address: int) -> Callable[[int, int, int, int], None]:
    """A kernel as a Python function; it runs without the interpreter's lock."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(address)
