"""The folder that keeps compiled kernels: one writer at a time, and nothing is ever half-written.

Each version of the kernels has a folder of its own, named by a key. A file holds the SHA-256 of the
kernel's name and code, then the code. The lock is the operating system's: it ends with its process,
however that ends, and what a killed process left behind is removed by the next writer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import InvalidInput
from .files import replacing, try_lock
from .places import cache_folder

#: Folders of other keys that stay: other versions, virtual environments and machines.
KEPT_FOLDERS = 6
#: Seconds to wait for another writer. Then both write, which costs time and does no harm.
PATIENCE = 120.0

_DIGEST = hashlib.sha256().digest_size
_KEY = re.compile(r"[0-9a-f]{24}")
_LOCK = "lock"


class ObjectFolder:
    """The object code of one version of the kernels.

    `trouble` is why it cannot be written to, once that has shown.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self.trouble: str | None = None
        self._told = False

    @property
    def path(self) -> Path:
        """Where the files are; raises OSError for a user without a home."""
        return cache_folder() / self._key

    def read(self, name: str) -> bytes | None:
        """Object code of a kernel, or None where there is none or it is damaged."""
        try:
            _check_own(self.path)
            content = (self.path / f"{name}.o").read_bytes()
        except OSError:
            return None
        digest, code = content[:_DIGEST], content[_DIGEST:]
        return code if _seal(name, code) == digest else None

    def write(self, name: str, code: bytes) -> None:
        """Keep a kernel; where that fails, `trouble` says why and nothing more is tried."""
        if self.trouble is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _check_own(self.path)
            with replacing(self.path / f"{name}.o", flush=False) as partial:
                partial.write_bytes(_seal(name, code) + code)
        except (OSError, InvalidInput) as error:
            self._failed(error)

    @contextlib.contextmanager
    def writing(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Be the only writer, and tidy up; `waiting` is called when another process is writing."""
        descriptor = None
        try:
            descriptor = self._open_lock()
        except OSError as error:
            self._failed(error)
        if descriptor is None:
            yield
            return
        try:
            if _wait(descriptor, waiting):
                self._tidy()
            yield
        finally:
            os.close(descriptor)

    def check(self, needed: bool) -> None:
        """Raise InvalidInput for a folder that cannot be written to where one is needed."""
        if needed and self.trouble is not None:
            raise InvalidInput(self.trouble)

    def tell(self, notice: Callable[[str], None]) -> None:
        """Pass on what the trouble is, once."""
        if self.trouble is not None and not self._told:
            self._told = True
            notice(self.trouble)

    def _open_lock(self) -> int:
        self.path.mkdir(parents=True, exist_ok=True)
        return os.open(self.path.parent / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)

    def _tidy(self) -> None:
        """Remove what killed writers left, and the folders that were not written to for longest."""
        with contextlib.suppress(OSError):
            os.utime(self.path)
            others = [
                entry
                for entry in self.path.parent.iterdir()
                if _KEY.fullmatch(entry.name) and entry.is_dir() and entry != self.path
            ]
            others.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
            for old in others[KEPT_FOLDERS:]:
                _remove(old, "*.o")
                _remove(old, ".*.partial")
                with contextlib.suppress(OSError):
                    old.rmdir()
            for entry in [self.path, *others[:KEPT_FOLDERS]]:
                _remove(entry, ".*.partial")

    def _failed(self, error: Exception) -> None:
        # The kernels' own folder is no help to a user; the one they can name is.
        cause = error.__cause__ or error.__context__ or error
        reason = getattr(cause, "strerror", None) or str(cause)
        try:
            where = f"in {cache_folder()} ({reason})"
        except OSError:
            where = f"({reason})"
        self.trouble = (
            f"compiled kernels cannot be kept {where}, so every start compiles them anew; "
            "mend that, or name another folder in KEELBACK_CACHE"
        )


def _check_own(folder: Path) -> None:
    """Raise PermissionError for a folder that others can write to: what it holds is run."""
    if sys.platform == "win32":
        return
    found = folder.stat()
    stranger = found.st_uid not in (os.getuid(), 0) and os.getuid() != 0
    if stranger or found.st_mode & 0o002:
        raise PermissionError(errno.EACCES, "other users can write to it")


def _wait(descriptor: int, waiting: Callable[[], None]) -> bool:
    """Get the lock; False where the wait was too long or there are no locks."""
    began, told = time.monotonic(), False
    while True:
        try:
            if try_lock(descriptor):
                return True
        except OSError:
            return False
        if time.monotonic() - began > PATIENCE:
            return False
        if not told:
            waiting()
            told = True
        time.sleep(0.05)


def _remove(folder: Path, pattern: str) -> None:
    for file in folder.glob(pattern):
        with contextlib.suppress(OSError):
            file.unlink()


def _seal(name: str, code: bytes) -> bytes:
    """A hash of a kernel's code and of its name, so that no file passes for another."""
    return hashlib.sha256(name.encode() + b"\0" + code).digest()
