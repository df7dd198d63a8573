"""The pieces of a file's tensors, made in threads somewhat before they are written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from ..kernels.cores import processors

Task = Callable[[], bytes | memoryview]
#: Gives a tensor's tasks, in the order of its bytes.
Tasks = Callable[[], Iterable[Task]]


class Ahead:
    """A context in which tensors are made, each after the other in the order of `work`.

    Threads go on with the next tensors while one is written; how far depends on their number, so
    that little memory is taken. At the context's end, also after an error, no task is left.
    """

    def __init__(self, work: Sequence[Tasks], threads: int | None = None) -> None:
        self._threads = threads or processors()
        self._todo = ((index, task) for index, tasks in enumerate(work) for task in tasks())
        self._begun: deque[tuple[int, Future[bytes | memoryview]]] = deque()
        self._count = len(work)

    def __enter__(self) -> list[Callable[[], Iterator[bytes | memoryview]]]:
        """For each tensor what gives its pieces, to be asked in order."""
        self._pool = ThreadPoolExecutor(self._threads)
        return [partial(self._pieces, index) for index in range(self._count)]

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _pieces(self, index: int) -> Iterator[bytes | memoryview]:
        while True:
            while len(self._begun) < 2 * self._threads + 1:
                owner, task = next(self._todo, (None, None))
                if owner is None or task is None:
                    break
                self._begun.append((owner, self._pool.submit(task)))
            if not self._begun or self._begun[0][0] != index:
                return
            yield self._begun.popleft()[1].result()
