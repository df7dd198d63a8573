"""Resident worker threads that walk op tables: one set a process.

A worker waits in native code for a millisecond or two after each forward, where the next one
reaches it at once; then it sleeps in Python, and is woken.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue

import numpy as np

from ..kernels import table
from ..kernels.errors import InvalidInput
from ..kernels.objects import callable_kernel
from .platform import pages, yield_address
from .threads import pool

MAX_THREADS = 256

_MODULE = f"{table.__package__}.walk_cpu"
KERNELS = tuple((name, _MODULE) for name in ("post", "lead", "serve"))

_Native = Callable[[int, int, int, int], None]


class Workers:
    """Threads beside the pool's first, which leads them; started when they are first needed."""

    def __init__(self, post: _Native, lead: _Native, serve: _Native) -> None:
        self._post, self._lead, self._serve = post, lead, serve
        size = 8 * table.SEATS + MAX_THREADS * table.SEAT_BYTES
        self._board = pages(size).view(np.int64)
        # A worker may still look at the board when the interpreter has ended.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._board))
        self._board[table.GIVE_UP] = yield_address()
        seats = self._board[table.SEATS :].reshape(MAX_THREADS, -1)
        self._seen, self._called = seats[:, table.SEEN], seats[:, table.CALLED]
        self._address = self._board.ctypes.data
        self._inboxes: list[SimpleQueue[None]] = []

    def play(self, records: int, context: int, threads: int) -> None:
        """Walk the records at an address with a number of threads; by the pool's first thread.

        Raises InvalidInput where so many threads cannot be started.
        """
        while len(self._inboxes) < threads - 1:
            self._hire()
        self._post(self._address, records, context, threads)
        if self._called[1:threads].any():
            for worker in range(1, threads):
                if self._called[worker]:
                    self._inboxes[worker - 1].put(None)
        self._lead(self._address, records, context, threads)

    def _hire(self) -> None:
        """Start a thread that serves for the process's life."""
        inbox: SimpleQueue[None] = SimpleQueue()
        worker, board, serve = len(self._inboxes) + 1, self._address, self._serve
        # What was posted before is not for this one.
        self._seen[worker] = self._board[table.TURN]

        def follow() -> None:
            while True:
                inbox.get()
                serve(board, worker, 0, 0)

        try:
            threading.Thread(target=follow, name=f"keelback-{worker}", daemon=True).start()
        except RuntimeError as error:
            raise InvalidInput(f"thread {worker} cannot be started ({error}); use fewer") from None
        self._inboxes.append(inbox)


def workers(addresses: Mapping[str, int]) -> Workers:
    """The workers of this process; addresses: those of KERNELS."""
    shared = pool()
    if shared.workers is None:
        shared.workers = Workers(*(callable_kernel(addresses[name]) for name, _ in KERNELS))
    return shared.workers
