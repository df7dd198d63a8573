"""Resident worker threads: one pool a process, asleep between forwards.

Python's signal handlers do not run inside a native call, so the calling thread does no work itself:
it waits where Ctrl-C can reach it, and asks the workers to stop through the cancel flag.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np

Task = Callable[[int], None]


class Worker:
    """A thread that runs one task at a time."""

    def __init__(self, number: int, finished: Callable[[], None]) -> None:
        self._task: Task | None = None
        self._wake = threading.Semaphore(0)
        self._number, self._finished = number, finished
        threading.Thread(target=self._run, name=f"keelback-{number}", daemon=True).start()

    def start(self, task: Task) -> None:
        """Hand over a task; the worker must be idle."""
        self._task = task
        self._wake.release()

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            assert self._task is not None
            self._task(self._number)
            self._task = None
            self._finished()


class Pool:
    """Workers shared by all models of the process; calls are served one after another."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []
        self._done = threading.Semaphore(0)
        self._turn = threading.Lock()

    def run(self, task: Task, threads: int, cancel: np.ndarray | None = None) -> bool:
        """Call task(0) to task(threads - 1) in parallel; True when all of them came to their end.

        Ctrl-C sets `cancel[0]`, where a flag is given, and makes the result False once the workers
        have stopped; KeyboardInterrupt is raised only after the task has ended, in any case.
        """
        with self._turn:
            while len(self._workers) < threads:
                self._workers.append(Worker(len(self._workers), self._done.release))
            for worker in self._workers[:threads]:
                worker.start(task)
            interrupted, left = False, threads
            while left:
                try:
                    self._done.acquire()
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
