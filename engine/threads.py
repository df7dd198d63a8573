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


class Job:
    """A task for `threads` threads. `done` is locked until it has come to its end."""

    def __init__(self, task: Task, threads: int) -> None:
        self.task, self.threads = task, threads
        self.done = threading.Lock()
        self.done.acquire()


class Pool:
    """Workers shared by all models of the process; calls are served one after another.

    The caller hands a job to the first worker alone, which brings in the others: so an interrupt
    finds a job either handed over or not, and never half.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._inboxes: list[SimpleQueue[Task]] = []
        self._ready: SimpleQueue[None] = SimpleQueue()
        self._turn = threading.Lock()
        self._started = False

    def run(self, task: Task, threads: int, cancel: np.ndarray | None = None) -> bool:
        """Call task(0) to task(threads - 1) in parallel and return when all have ended.

        True says that Ctrl-C was pressed meanwhile; it has set `cancel[0]` where a flag is given.
        """
        interrupted = False
        with self._turn:
            if not self._started:
                threading.Thread(target=self._lead, name="keelback-0", daemon=True).start()
                self._started = True
            job = Job(task, threads)
            while True:
                try:
                    # Handing a job over again does no harm, and it may not have been.
                    self._jobs.put(job)
                    job.done.acquire()
                    return interrupted
                except KeyboardInterrupt:
                    interrupted = True
                    if cancel is not None:
                        cancel[0] = 1

    def _lead(self) -> None:
        last = None
        while True:
            job = self._jobs.get()
            if job is not last:
                while len(self._inboxes) < job.threads - 1:
                    self._hire()
                for inbox in self._inboxes[: job.threads - 1]:
                    inbox.put(job.task)
                job.task(0)
                for _ in range(job.threads - 1):
                    self._ready.get()
                last = job
            if job.done.locked():
                job.done.release()

    def _hire(self) -> None:
        """Start a thread that runs the tasks of its inbox, for the process's life."""
        inbox: SimpleQueue[Task] = SimpleQueue()
        self._inboxes.append(inbox)
        number = len(self._inboxes)

        def follow() -> None:
            while True:
                inbox.get()(number)
                self._ready.put(None)

        threading.Thread(target=follow, name=f"keelback-{number}", daemon=True).start()


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
