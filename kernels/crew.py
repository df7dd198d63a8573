"""Compiling kernels on several cores: processes that help, for a compiler uses one.

All take from one list, so whoever is done goes on with the next kernel. A helper reads a line with
the name of a kernel and its module, and writes the size of its object code and the code. One that
fails is left out, and what it was given is compiled here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import IO

from .cores import processors
from .interrupts import held_back

#: Processes that help at most; each takes 200 MB for its compiler.
MOST_HELPERS = 3
#: Kernels for each process: its start takes as long as compiling one or two.
ENOUGH = 3
_SIZE = 8

Kernel = tuple[str, str]


def compile_kernels(kernels: list[Kernel]) -> Generator[tuple[Kernel, bytes], None, None]:
    """Compile kernels, given as (name, module); yields each with its object code when it is done.

    Processes that still help are ended with the generator.
    """
    # Long sources take long; one of those should not be the last.
    waiting = deque(sorted(kernels, key=_source_size, reverse=True))
    done: SimpleQueue[tuple[Kernel, bytes] | None] = SimpleQueue()
    with contextlib.ExitStack() as crew:
        for _ in range(min(MOST_HELPERS, processors() - 1, len(kernels) // ENOUGH - 1)):
            with contextlib.suppress(OSError):
                crew.enter_context(_helping(waiting, done))
        with held_back():
            from .jit import compile_kernel

        left = len(kernels)
        while left:
            if not done.empty():
                found = done.get()
            elif (kernel := _next(waiting)) is not None:
                with held_back():
                    found = kernel, compile_kernel(*kernel)
            else:
                found = done.get()
            if found is not None:
                left -= 1
                yield found


@contextlib.contextmanager
def _helping(
    waiting: deque[Kernel], done: SimpleQueue[tuple[Kernel, bytes] | None]
) -> Iterator[None]:
    """Have a process compile what waits, until the end of the context."""
    process = _start()
    assert process.stdin is not None and process.stdout is not None
    to, back = process.stdin, process.stdout

    def lead() -> None:
        while (kernel := _next(waiting)) is not None:
            code = _answer(to, back, kernel)
            if code is None:
                waiting.append(kernel)
                # Somebody may be waiting for this one alone.
                done.put(None)
                return
            done.put((kernel, code))

    leader = threading.Thread(target=lead, daemon=True)
    leader.start()
    try:
        yield
    finally:
        process.kill()
        leader.join()
        with contextlib.suppress(OSError), process:
            pass


def _start() -> subprocess.Popen[bytes]:
    """A process that finds modules where this one does."""
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import help_out; help_out()"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
    )


def _answer(to: IO[bytes], back: IO[bytes], kernel: Kernel) -> bytes | None:
    """A helper's object code of a kernel; None where it failed."""
    try:
        to.write(" ".join(kernel).encode() + b"\n")
        to.flush()
        size = int.from_bytes(back.read(_SIZE), "little")
        code = back.read(size)
    except (OSError, ValueError):
        return None
    return code if size and len(code) == size else None


def help_out() -> None:
    """Compile what standard input names, until it ends."""
    # An interruption ends the process that asks, and that one ends this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from .jit import compile_kernel

    # What libraries print must not come between.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, module = line.split()
        code = compile_kernel(name, module)
        answers.write(len(code).to_bytes(_SIZE, "little") + code)
        answers.flush()


def _next(waiting: deque[Kernel]) -> Kernel | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _source_size(kernel: Kernel) -> int:
    spec = importlib.util.find_spec(kernel[1])
    return os.stat(spec.origin).st_size if spec is not None and spec.origin is not None else 0
