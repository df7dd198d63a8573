"""What differs between operating systems: pages, memory's room and its peak."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform as machine
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

from ..kernels.groups import control_groups

# Files of a control group of version 1 and 2: its limit, what it uses; and pages of files there.
_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = ("memory.max", "memory.current", "inactive_file")


@cache
def yield_address() -> int:
    """Address of the C function that gives up the processor, or 0 where there is none."""
    if sys.platform == "win32":
        return 0
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


def pages(nbytes: int) -> np.ndarray:
    """Zeroed memory that begins a page, in large pages where the system has them: uint8.

    Raises MemoryError where there is none.
    """
    # Shared memory, which mmap gives by default, comes in small pages only.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
    try:
        memory = mmap.mmap(-1, max(1, nbytes), **private)
    except OSError:
        raise MemoryError from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes)


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, by the system and by the process's control groups.

    None where the system does not tell.
    """
    rooms = (_meminfo("MemAvailable"), *_group_rooms(control_groups("memory")))
    return min((room for room in rooms if room is not None), default=None)


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)


def _group_rooms(groups: Iterable[tuple[Path, bool]]) -> Iterator[int]:
    """What each control group has left; pages of files can be given back."""
    for group, second in groups:
        limit, used, cached = _SECOND if second else _FIRST
        with contextlib.suppress(OSError, ValueError, StopIteration):
            most = int((group / limit).read_text())
            stat = (group / "memory.stat").read_text().splitlines()
            files = next(int(row.split()[1]) for row in stat if row.split()[0] == cached)
            yield max(0, most - int((group / used).read_text()) + files)


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return machine.processor() or machine.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, machine.machine())


def reset_peak() -> None:
    """Let `peak_resident` count from now on, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int | None:
    """The most bytes of memory that this process has held, None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), None)
