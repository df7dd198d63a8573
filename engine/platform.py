"""What differs between operating systems: processors, giving them up, the cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
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
