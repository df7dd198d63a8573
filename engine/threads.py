"""Resident worker threads: one pool a process, asleep between forwards.

Python's signal handlers do not run inside a native call, so the calling thread does no work itself:
it waits where Ctrl-C can reach it, and asks the workers to stop through the cancel flag.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np

Task = Callable[[int], None]


class Pool:
    """Workers shared by all models of the process; calls are served one after another."""

    def __init__(self) -> None:
        self._inboxes: list[SimpleQueue[Task]] = []
        self._done: SimpleQueue[None] = SimpleQueue()
        self._turn = threading.Lock()

    def _hire(self) -> None:
        """Start a thread that runs the tasks of its inbox, for the process's life."""
        inbox: SimpleQueue[Task] = SimpleQueue()
        number = len(self._inboxes)
        self._inboxes.append(inbox)

        def work() -> None:
            while True:
                inbox.get()(number)
                self._done.put(None)

        threading.Thread(target=work, name=f"keelback-{number}", daemon=True).start()

    def run(self, task: Task, threads: int, cancel: np.ndarray | None = None) -> bool:
        """Call task(0) to task(threads - 1) in parallel; True when all of them came to their end.

        Ctrl-C sets `cancel[0]`, where a flag is given, and makes the result False once the workers
        have stopped; KeyboardInterrupt is raised only after the task has ended, in any case.
        """
        with self._turn:
            while len(self._inboxes) < threads:
                self._hire()
            for inbox in self._inboxes[:threads]:
                inbox.put(task)
            interrupted, left = False, threads
            while left:
                try:
                    self._done.get()
                    left -= 1
                except KeyboardInterrupt:
                    interrupted = True
                    if cancel is not None:
                        cancel[0] = 1
        if interrupted and cancel is None:
            raise KeyboardInterrupt
        return not interrupted


_pool = Pool()


def pool() -> Pool:
    """The pool of this process."""
    return _pool


def _after_fork() -> None:
    """Threads do not survive a fork: the child starts with a pool of its own."""
    global _pool
    _pool = Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
