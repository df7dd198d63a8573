"""The thread that makes forwards: one a process, asleep in between.

Python's signal handlers run in the main thread, between two of its instructions. So a forward, with
all that it does to a state, is made by the pool's first thread, where no Ctrl-C can tear it; the
caller waits where Ctrl-C can reach it, and asks for an end through the forward's cancel flag.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np


class CancelFlag:
    """Asks a forward to end, for good. Kernels poll it: it is a number in memory of its own."""

    def __init__(self) -> None:
        self.cell = np.zeros(1, np.int64)

    def set(self) -> None:
        """Ask for an end; from a signal handler or any thread."""
        self.cell[0] = 1

    @property
    def is_set(self) -> bool:
        """Whether an end has been asked for."""
        return bool(self.cell[0])


class Job:
    """A function for the pool's first thread. `done` is locked until it has come to its end."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self.body = body
        self.result: Any = None
        self.error: BaseException | None = None
        self.finished = False
        self._claim = threading.Lock()
        self.done = threading.Lock()
        self.done.acquire()

    def run(self) -> None:
        """Run it, once; later calls only wake a caller that handed it over twice."""
        if self._claim.acquire(blocking=False):
            try:
                self.result = self.body()
            except BaseException as error:
                self.error = error
            self.finished = True
        if self.finished:
            with contextlib.suppress(RuntimeError):
                self.done.release()


class Early:
    """A value that a thread of its own makes; called, it waits for it, and raises its error.

    The process does not end before it: a thread that is stopped inside a library written in C++
    aborts everything.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._job = Job(make)
        self._thread = threading.Thread(target=self._job.run)
        self._thread.start()

    def ready(self) -> bool:
        """Whether a call would not wait."""
        return not self._thread.is_alive()

    def __call__(self) -> Any:
        self._thread.join()
        if self._job.error is not None:
            raise self._job.error
        return self._job.result


class Pool:
    """What all models of the process share; `turn` is held by the call that uses it."""

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        #: The native workers of this process, once there are any; see workers.py.
        self.workers: Any = None
        self._started = False

    def call(self, body: Callable[[], Any], cancel: CancelFlag) -> Any:
        """Run `body` in the pool's first thread and return what it returns, or raise its error.

        What a signal handler raises meanwhile, KeyboardInterrupt above all, sets `cancel` and is
        raised once the body has ended.
        """
        if not self._started:
            threading.Thread(target=self._lead, name="keelback-0", daemon=True).start()
            self._started = True
        job: Job = Job(body)
        raised: BaseException | None = None
        while not job.finished:
            try:
                while not job.finished:
                    try:
                        if raised is not None:
                            cancel.set()
                        # What a signal raises may come before the job is handed over, or after.
                        self._jobs.put(job)
                        job.done.acquire()
                    except BaseException as error:
                        raised = error
            except BaseException as error:
                # One may come behind another, on the way back to the inner `try`.
                raised = error
        if raised is not None:
            raise raised
        if job.error is not None:
            raise job.error
        return job.result

    def _lead(self) -> None:
        while True:
            job = self._jobs.get()
            job.run()
            # What the job refers to, a whole model perhaps, must not live on in here.
            del job


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
