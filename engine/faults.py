"""What becomes of a mapped file that can no longer be read: a sentence in place of a signal.

A disk that is unplugged, or a file that another program cuts short, shows in a map only when a byte
is needed: the system then sends SIGBUS, and the default is to end without a word.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from threading import Lock


def explain_bus_errors() -> None:
    """End this process with a sentence and status 1 when a map fails, where there is that signal.

    Python's own handlers are no use here: they run after the instruction that can never finish.
    """
    if hasattr(signal, "SIGBUS"):
        ctypes.CDLL(None).signal(signal.SIGBUS, _HANDLER)


def _lost(_number: int) -> None:
    """Runs in the thread that needed the byte, and ends all of them; only the first one speaks."""
    _FIRST.acquire()
    os.write(
        2, f"Error: {_mapped() or 'a mapped file'} can no longer be read: {_REASON}\n".encode()
    )
    os._exit(1)


_REASON = (
    "its disk fails or is gone, or another program has cut it short; check the disk, and download "
    "or convert the file again if it is damaged"
)
_FIRST = Lock()
# Kept here, for the system knows only its address.
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)(_lost)


def _mapped() -> str:
    """The model files that are mapped, for the signal does not say which one failed."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ""
    paths = {line.split(maxsplit=5)[-1].removesuffix(" (deleted)") for line in lines}
    return " or ".join(sorted(path for path in paths if path.endswith(".gguf")))
