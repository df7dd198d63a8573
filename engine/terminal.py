"""What surrounds a run on a terminal: the prompt's source, figures, Ctrl-C, saving at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from ..kernels.errors import InvalidInput
from ..kernels.files import check_target
from .printing import bar
from .session import Session
from .wording import notice, rate, size, typed_size


def read_prompt(text: str | None, file: str | None, needed: bool) -> str:
    """The prompt from the command line, a file or a pipe; InvalidInput without any."""
    if file is not None:
        text = read_file(file)
    elif text is None and _piped(sys.stdin):
        text = read_file("-")
    if needed and not text:
        raise InvalidInput("the prompt is empty; give some text with -p, -f or through a pipe")
    return text or ""


def read_file(file: str, most: int = -1) -> str:
    """The text of a file that the user named, "-" the standard input; InvalidInput without one.

    Of more than `most` bytes, if that is given, no more are read.
    """
    name, source = ("the standard input", 0) if file == "-" else (file, file)
    try:
        with open(source, "rb", closefd=source != 0) as stream:
            return _decoded(stream.read(most), name)
    except OSError as error:
        raise InvalidInput(f"{name} cannot be read ({error.strerror})") from None


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
    # What parts the model has is known only now.
    check_target(path, (part.path for part in session.model.file.parts))
    try:
        yield
    finally:
        if session.state.position == 0:
            notice(f"nothing was read, and nothing is saved: {path} stays as it was")
        elif not session.state.damaged:
            session.snapshot().save(path)


class Meter:
    """Runs a session and measures it."""

    def __init__(self, session: Session, load_seconds: float) -> None:
        self.session, self.load_seconds = session, load_seconds
        self.prompt_tokens, self.prompt_seconds, self.seconds = 0, 0.0, 0.0
        self.full = False

    def read(self, text: str, encode: Callable[[str], list[int]]) -> None:
        """Feed the prompt, with a progress bar when it takes more than a moment."""
        began, before = time.perf_counter(), self.session.state.position
        try:
            ids = encode(text)
            with bar("reading") as report:
                self.session.feed(ids, progress=lambda done: report(done, len(ids)))
        finally:
            self.prompt_tokens = self.session.state.position - before
            self.prompt_seconds = time.perf_counter() - began

    def write(self, limit: int | None, flush: bool) -> None:
        """Print text as it comes."""
        began = time.perf_counter()
        try:
            for piece in self.session.generate(limit):
                click.echo(piece, nl=False)
            ended = self.session.finish_reason == "length"
            self.full = ended and self.session.generated != limit
            if flush:
                click.echo(self.session.stream.flush(), nl=False)
        finally:
            self.seconds = time.perf_counter() - began

    def report(self) -> None:
        """End the text; tell what the run took, and whether it ended for want of room."""
        click.echo()
        if self.full:
            context = self.session.model.context
            notice(f"the context of {context} tokens is full; give a larger one (-c)")
        click.echo(self._line(), err=True)

    def _line(self) -> str:
        layout, written = self.session.state.layout, self.session.generated
        parts = [
            f"load {self.load_seconds:.2f} s",
            f"prompt {self.prompt_tokens} tokens, {rate(self.prompt_tokens, self.prompt_seconds)}",
            f"generated {written} tokens, {rate(written, self.seconds)}",
            f"state {typed_size(layout.fixed_bytes, layout.state_type)} fixed + "
            f"{size(layout.bytes_per_token)} per token",
            f"seed {self.session.sampling.seed}",
        ]
        return " | ".join(parts)
