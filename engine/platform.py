"""What differs between operating systems: processors, the cache folder, locks, memory's peak."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform as machine
import sys
from functools import cache
from pathlib import Path

import numpy as np


def processors() -> int:
    """Processors this process may use, by affinity and by its control group's quota; at least 1."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return max(1, count)


def cache_folder() -> Path:
    """Where compiled kernels are kept; KEELBACK_CACHE names another place.

    Raises OSError for a user without a home.
    """
    if named := os.environ.get("KEELBACK_CACHE"):
        return Path(named)
    if base := os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(base) / "keelback"
    try:
        home = Path.home()
    except RuntimeError:
        raise FileNotFoundError("this user has no home folder") from None
    inside = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    return home / inside / "keelback"


@cache
def yield_address() -> int:
    """Address of the C function that gives up the processor, or 0 where there is none."""
    if sys.platform == "win32":
        return 0
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


def pages(nbytes: int) -> np.ndarray:
    """Zeroed memory that begins a page, in large pages where the system has them: uint8."""
    memory = mmap.mmap(-1, max(1, nbytes))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes)


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process, unless another one has it; the lock ends with either.

    Raises OSError where the file system has no locks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


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
