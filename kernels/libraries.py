"""The memory of loaded libraries' code, which the system can read again from their files."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

# start-end access offset device inode path, and the lines of facts below.
_MAPPING = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ +(\S.*)((?:\n[A-Z].*)*)", re.MULTILINE
)


def release_library(name: str) -> None:
    """Give back the memory of a loaded library's code, which is read again where it is needed.

    Only of parts that nothing has written to: those are in the file, and lose nothing.
    """
    try:
        mappings = Path("/proc/self/smaps").read_text()
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end, access, path, facts in _MAPPING.findall(mappings):
        if name in path and "w" not in access and "\nAnonymous:             0 kB" in facts:
            first = int(start, 16)
            advise(first, int(end, 16) - first, mmap.MADV_DONTNEED)
