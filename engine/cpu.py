"""The `cpu` backend: every thread walks the op table in one native call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..kernels import table
from ..kernels.errors import InvalidInput
from ..models.graph import Graph
from .backend import MAX_ROWS, Batch, Forward
from .lowering import lower
from .objects import addresses, callable_kernel, folder
from .platform import processors, yield_address
from .state import PAGE_ROWS, aligned
from .threads import pool
from .weights import WeightStore

MAX_THREADS = 256
#: Where the cancel flag lies behind the arrivals counter: on a cache line of its own.
CANCEL_FLAG = 8
_WALK = ("walk", f"{table.__package__}.walk_cpu")


class CpuBackend:
    """Kernels compiled by Numba, played by resident threads."""

    preemptible = False

    def __init__(
        self, graph: Graph, weights: WeightStore, threads: int | None, notice: Callable[[str], None]
    ) -> None:
        self.threads = check_threads(threads)
        self.numerics = f"cpu/{folder().name}"
        self.delay_seed = 0
        self._cancellable = False
        self._program = lower(graph, weights, MAX_ROWS)
        found = addresses([*self._program.kernels, _WALK], notice)
        self._program.records[:, table.KERNEL] = [found[name] for name, _ in self._program.kernels]
        self._walk = callable_kernel(found["walk"])
        self._arena = aligned(self._program.arena_bytes // 4)
        self._counters = np.zeros(len(self._program.records), np.int64)
        # The arrivals counter and the cancel flag, each on a cache line of its own.
        self._flags = aligned(64).view(np.int64)
        self._context = self._fixed_context()

    def _fixed_context(self) -> np.ndarray:
        """The fields that no call changes."""
        regions = [self._arena, self._arena, *self._program.weights]
        self._bases = np.array([_address(region) for region in regions], np.int64)
        context = np.zeros(table.CONTEXT, np.int64)
        context[table.OPS] = len(self._program.records)
        context[table.BASES] = _address(self._bases)
        context[table.COUNTERS] = _address(self._counters)
        context[table.BARRIER] = _address(self._flags)
        context[table.CANCEL] = _address(self._flags[CANCEL_FLAG:])
        context[table.YIELD] = yield_address()
        context[table.PAGE_ROWS] = PAGE_ROWS
        return context

    def forward(self, batch: Batch, cancellable: bool) -> Forward:
        """See Backend. A cancelled forward leaves states half changed; the caller restores them."""
        logits = np.empty((len(batch.outputs), self._program.vocabulary), np.float32)
        states = _addresses([state.block for state in batch.states])
        positions = np.array([state.position for state in batch.states], np.int64)
        tables = [_addresses(state.pages) for state in batch.states]
        page_tables = _addresses(tables)
        self._bases[table.LOGITS] = _address(logits)
        self._counters[:] = 0
        self._flags[:] = 0
        context = self._context
        context[table.TOKENS], context[table.OUTPUT_COUNT] = len(batch.ids), len(batch.outputs)
        context[table.SEQUENCES], context[table.OFFSETS] = (
            len(batch.states),
            _address(batch.offsets),
        )
        context[table.STATES], context[table.POSITIONS] = _address(states), _address(positions)
        context[table.PAGE_TABLES] = _address(page_tables)
        context[table.IDS_ADDRESS], context[table.OUTPUT_ADDRESS] = (
            _address(batch.ids),
            _address(batch.outputs),
        )
        context[table.DELAY] = self.delay_seed

        records, call, threads = _address(self._program.records), _address(context), self.threads
        self._cancellable = cancellable
        cancel = self._flags[CANCEL_FLAG:] if cancellable else None
        interrupted = pool().run(
            lambda thread: self._walk(records, call, thread, threads), threads, cancel
        )
        self._cancellable = False
        return Forward(None if self._flags[CANCEL_FLAG] else logits, interrupted)

    def cancel(self) -> None:
        """See Backend."""
        if self._cancellable:
            self._flags[CANCEL_FLAG] = 1


def check_threads(threads: int | None) -> int:
    """The number of threads to use; raises InvalidInput when it is out of range."""
    if threads is None:
        return processors()
    if not 1 <= threads <= MAX_THREADS:
        raise InvalidInput(
            f"{threads} threads were asked for; give a number from 1 to {MAX_THREADS}"
        )
    return threads


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def _addresses(arrays: list[np.ndarray]) -> np.ndarray:
    return np.array([array.ctypes.data for array in arrays], np.int64)
