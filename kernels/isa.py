"""Which instructions kernels are compiled for; chosen once a process.

`KEELBACK_ISA` forces a lower level than the machine's: the code then uses nothing above it, so that
every path can be tested on one machine.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache

from .errors import InvalidInput

#: x86 levels, best first: what the processor must have, what code for it must not use, and the
#: processor to compile for ("" is the machine's own).
_X86 = {
    "vnni512": (("avx512vnni", "avx512bw", "avx512vl"), (), ""),
    "vnni256": (("avxvnni", "avx2", "fma", "f16c"), ("avx512", "avx10"), ""),
    "avx2": (("avx2", "fma", "f16c"), (), "x86-64-v3"),
    "generic": ((), (), "x86-64-v2"),
}
_ARM = {"neon": (("dotprod",), (), ""), "generic": ((), (), "")}


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set: its name, and the processor and features that LLVM compiles for."""

    name: str
    cpu: str
    features: str
    fma: bool
    f16c: bool


@cache
def isa() -> Isa:
    """The best level this machine has, or the one that KEELBACK_ISA names.

    Raises InvalidInput for a level that is unknown or that this machine lacks.
    """
    import llvmlite.binding as llvm

    arm = platform.machine().lower() in ("aarch64", "arm64")
    levels = _ARM if arm else _X86
    features = llvm.get_host_cpu_features()
    usable = [name for name, (needs, _, _) in levels.items() if all(map(features.get, needs))]
    name = os.environ.get("KEELBACK_ISA") or usable[0]
    if name not in usable:
        raise InvalidInput(f"KEELBACK_ISA={name} is not one of {', '.join(usable)}")
    _, without, cpu = levels[name]
    if cpu:
        return Isa(name, cpu, "", fma=name == "avx2", f16c=name == "avx2")
    flags = ",".join(
        ("+" if on and not flag.startswith(without) else "-") + flag
        for flag, on in sorted(features.items())
    )
    return Isa(name, llvm.get_host_cpu_name(), flags, fma=arm or features["fma"], f16c=True)
