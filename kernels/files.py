"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import InvalidInput

_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")


def check_target(path: str | Path, sources: Iterable[str | Path | None] = ()) -> Path:
    """Where a file named by the user will be written; symbolic links are followed.

    Raises InvalidInput when that is a folder or a device, lies in no folder, or is one of
    `sources`, which are read.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            raise InvalidInput(f"{path} is no ordinary file; name another one to write")
        if target.exists() and any(s and Path(s).exists() and target.samefile(s) for s in sources):
            raise InvalidInput(f"{path} is read here; name another file to write")
        if not target.parent.is_dir():
            raise InvalidInput(f"{path} cannot be written: {target.parent} is no folder")
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror}") from None
    return target


@contextlib.contextmanager
def replacing(path: str | Path, flush: bool = True) -> Iterator[Path]:
    """A file beside `path` to write to; it takes that name at the end, and is removed on failure.

    It is on the disk before it takes the name, unless `flush` is off for what is soon made again.
    What a killed process left here is removed. Raises InvalidInput when the file cannot be
    written; one that was there then stays as it is. A BrokenPipeError is passed on: it is of what
    was printed meanwhile.
    """
    target = check_target(path)
    _remove_abandoned(target.parent)
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    descriptor = None
    try:
        descriptor = _locked(partial)
        yield partial
        if flush:
            os.fsync(descriptor)
        os.replace(partial, target)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if descriptor is not None:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            partial.unlink()


def check_space(
    folder: Path,
    nbytes: float,
    what: str = "the file",
    remedy: str = "name another place to write",
) -> None:
    """Raise InvalidInput when something of that size will not fit beside what is in a folder."""
    from shutil import disk_usage  # rarely needed, and slow to import

    try:
        free = disk_usage(folder).free
    except OSError:
        return
    if nbytes > free:
        raise InvalidInput(
            f"{what} takes {nbytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {folder}; "
            f"{remedy}"
        )


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


def _locked(partial: Path) -> int:
    """Create a file and lock it: the lock says that somebody is writing it."""
    while True:
        descriptor = os.open(partial, os.O_CREAT | os.O_RDWR, 0o666)
        ours = True
        # A lock of Windows keeps this process from writing, too.
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                ours = try_lock(descriptor)
        # Between the two steps it may have been taken for one that nobody writes.
        if ours and partial.exists():
            return descriptor
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove the files of writers that were killed: those whose locks can be had."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if _PARTIAL.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                _remove_if_abandoned(entry.path)


def _remove_if_abandoned(path: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        try:
            if try_lock(descriptor):
                os.unlink(path)
        finally:
            os.close(descriptor)
