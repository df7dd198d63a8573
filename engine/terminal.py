"""What surrounds a run on a terminal: the prompt's source, Ctrl-C, and saving at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidInput
from ..kernels.files import check_target
from .session import Session


def read_prompt(text: str | None, file: str | None, needed: bool) -> str:
    """The prompt from the command line, a file or a pipe; InvalidInput without any."""
    if file is not None:
        text = read_file(file)
    elif text is None and _piped(sys.stdin):
        text = _decoded(sys.stdin.buffer.read(), "the standard input")
    if needed and not text:
        raise InvalidInput("the prompt is empty; give some text with -p, -f or through a pipe")
    return text or ""


def read_file(file: str) -> str:
    """The text of a file that the user named; InvalidInput where it cannot be read."""
    try:
        return _decoded(Path(file).read_bytes(), file)
    except OSError as error:
        raise InvalidInput(f"{file} cannot be read ({error.strerror})") from None


def _piped(stream: Any) -> bool:
    """Whether a stream is a pipe or a file: a terminal and an idle descriptor are not read."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput(f"{name} is no UTF-8 text; convert it first") from None


@contextlib.contextmanager
def ctrl_c(session: Session) -> Iterator[list[int]]:
    """Let Ctrl-C end the session between two tokens; pressed again, it ends the program.

    Yields a list that is no longer empty once it has been pressed.
    """
    pressed: list[int] = []

    def press(number: int, _: object) -> None:
        signal.signal(signal.SIGINT, before)
        pressed.append(number)
        session.interrupt()

    before = signal.signal(signal.SIGINT, press)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def saving(session: Session, path: str | None) -> Iterator[None]:
    """Save the session at the end, however it comes: Ctrl-C and a closed pipe are ends too."""
    if path is None:
        yield
        return
    check_target(path)
    try:
        yield
    finally:
        if not session.state.damaged:
            session.snapshot().save(path)
