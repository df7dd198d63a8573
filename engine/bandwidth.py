"""How fast memory can be read, and how much of it a token needs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from ..kernels import table
from ..kernels.objects import addresses, callable_kernel
from ..kernels.op import Kind, Weight
from .model import Model

#: Bytes that are read: many times the largest cache of a laptop.
BUFFER = 512 << 20
#: Every thread's share is a multiple of this: eight cache lines.
_STEP = 512
_PROBE = ("probe", f"{table.__package__}.probe_cpu")


class Probe:
    """Reads a large buffer with a number of threads, each its own part from end to end."""

    def __init__(self, notice: Callable[[str], None], nbytes: int = BUFFER) -> None:
        self._read = callable_kernel(addresses([_PROBE], notice)[_PROBE[0]])
        # Written once: pages that were never written to are all the same page of zeros.
        self._buffer = np.ones(nbytes // 4, np.float32)

    def measure(self, threads: int) -> float:
        """Bytes per second of one pass."""
        nbytes = self._buffer.nbytes // (threads * _STEP) * threads * _STEP
        record = np.array([self._buffer.ctypes.data, nbytes], np.int64)
        sums = np.zeros(threads, np.float32)

        def read(thread: int) -> None:
            # The memory is its own too: after a Ctrl-C it may still read when nobody waits for it.
            self._read(record.ctypes.data, sums.ctypes.data, thread, threads)

        workers = [threading.Thread(target=read, args=(thread,)) for thread in range(1, threads)]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        read(0)
        for worker in workers:
            worker.join()
        return nbytes / (time.perf_counter() - began)


def moved_bytes(model: Model, position: int = 0) -> int:
    """Bytes that a token behind `position` others has to move: weights once, of a stack of experts
    those that are used, an embedding row, the state in and out, keys and values."""
    matrices: dict[str, int] = {}
    row = 0
    for node in model.graph.nodes:
        looked_up = any(operand.kind is Kind.IDS for operand in node.op.operands.values())
        for value in node.operands.values():
            if not isinstance(value, Weight):
                continue
            if looked_up:
                row = value.block.row_bytes(value.width)
            else:
                used, stacked = (node.attributes.get(key, 1) for key in ("used", "experts"))
                whole = len(value.shape) < 3
                nbytes = model.file.tensors[value.name].nbytes
                matrices[value.name] = nbytes if whole else nbytes * used // stacked
    layout = model.layout
    kept = 2 * layout.fixed_bytes + position * layout.bytes_per_token
    return sum(matrices.values()) + row + kept
