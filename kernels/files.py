"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from .errors import InvalidInput


def check_target(path: str | Path) -> Path:
    """Where a file named by the user will be written; symbolic links are followed.

    Raises InvalidInput when that is a folder or a device, or lies in no folder.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            raise InvalidInput(f"{path} is no ordinary file; name another one to write")
        if not target.parent.is_dir():
            raise InvalidInput(f"{path} cannot be written: {target.parent} is no folder")
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror}") from None
    return target


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes that name at the end, and is removed on failure.

    Raises InvalidInput when the file cannot be written; one that was there then stays as it is.
    """
    target = check_target(path)
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        yield partial
        os.replace(partial, target)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
