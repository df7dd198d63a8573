"""The `cpu` backend: every thread walks the op table in one native call."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from ..kernels import table
from ..kernels.attention import SPAN
from ..kernels.cores import processors
from ..kernels.errors import InvalidInput
from ..kernels.objects import Notice, addresses, key
from ..models.graph import Graph
from . import packing
from .backend import MAX_ROWS, Batch, Progress
from .footprint import Admission
from .lowering import lower
from .platform import pages, yield_address
from .state import PAGE_ROWS, SHARED_ROWS, Layout, aligned
from .threads import CancelFlag, pool
from .weights import WeightStore
from .workers import KERNELS, MAX_THREADS, workers

#: Seconds of loading before progress is told.
PATIENCE = 1.0
#: Bytes of weights that are rearranged for each row of a forward, where loading was stopped.
SLICE = 32 << 20


class CpuBackend:
    """Kernels compiled by Numba, played by resident threads."""

    def __init__(
        self,
        graph: Graph,
        weights: WeightStore,
        layout: Layout,
        threads: int | None,
        notice: Notice,
        progress: Progress | None = None,
        admit: Admission | None = None,
    ) -> None:
        """`progress` is told what is being done, steps done, and steps in all.

        `admit` may refuse, by raising, before anything is compiled. Weights come with `load`.
        """
        self.threads = check_threads(threads)
        self.numerics = f"cpu/{key()}"
        self.delay_seed = 0
        self._program = lower(graph, weights, layout, MAX_ROWS)
        if admit is not None:
            admit(self._program, weights, layout, self.threads)
        wanted = [*self._program.kernels, *packing.kernels(weights.packings), *KERNELS]
        told = progress or (lambda label, done, total: None)
        found = addresses(wanted, notice, partial(told, "compiling"))
        self._program.records[:, table.KERNEL] = [found[name] for name, _ in self._program.kernels]
        self._kernels = {name: found[name] for name, _ in KERNELS}
        self._arena = pages(self._program.arena_bytes).view(np.float32)
        self._counters = _counters(0, 0)
        # All threads spin on this counter: it has a cache line of its own.
        self._arrivals = aligned(16).view(np.int64)
        self._never = CancelFlag()
        self._scratch, self._partials = pages(0), pages(0)
        self._units = np.zeros(SHARED_ROWS * self._program.partials[0], np.int64)
        self._context = self._fixed_context()
        self._weights, self._told = weights, partial(told, "loading")
        self._packer = packing.Packer(weights, found, self._program.move)
        self._used = False

    def load(self, enough: Callable[[], bool] = lambda: False) -> None:
        """See Backend; what is not in panels then gets there with the forwards to come."""
        cancel, began = CancelFlag(), time.perf_counter()

        def progress(done: int, total: int) -> None:
            if time.perf_counter() - began > PATIENCE:
                self._told(done, total)

        with pool().turn:
            body = partial(self._packer.advance, self._pack, enough, cancel, progress)
            pool().call(body, cancel)
        self._weights.fill()

    def _fixed_context(self) -> np.ndarray:
        """The fields that no call changes."""
        regions = [self._arena, self._arena, *self._program.weights]
        self._bases = np.array([_address(region) for region in regions], np.int64)
        context = np.zeros(table.CONTEXT, np.int64)
        context[table.OPS] = len(self._program.records)
        context[table.BASES] = _address(self._bases)
        context[table.BARRIER] = _address(self._arrivals)
        context[table.YIELD] = yield_address()
        context[table.PAGE_ROWS] = PAGE_ROWS
        context[table.SCRATCH_BYTES] = self._program.scratch
        return context

    def forward(self, batch: Batch, cancel: CancelFlag | None = None) -> np.ndarray | None:
        """See Backend."""
        logits = np.empty((len(batch.outputs), self._program.vocabulary), np.float32)
        states = _addresses([state.block for state in batch.states])
        positions = np.array([state.position for state in batch.states], np.int64)
        tables = [_addresses(state.pages) for state in batch.states]
        page_tables = _addresses(tables)
        flag = self._never if cancel is None else cancel
        self._pack_more(len(batch.ids), flag)
        self._bases[table.LOGITS] = _address(logits)
        if len(self._counters) < self.threads:
            self._counters = _counters(self.threads, len(self._program.records))
        self._counters[:] = 0
        self._arrivals[:] = 0
        if len(self._scratch) < self.threads * self._program.scratch:
            self._scratch = pages(self.threads * self._program.scratch)
        context = self._context
        self._share(batch)
        _set_counters(context, self._counters)
        context[table.SCRATCH] = _address(self._scratch)
        context[table.TOKENS], context[table.OUTPUT_COUNT] = len(batch.ids), len(batch.outputs)
        context[table.SEQUENCES] = len(batch.states)
        context[table.OFFSETS] = _address(batch.offsets)
        context[table.STATES], context[table.POSITIONS] = _address(states), _address(positions)
        context[table.PAGE_TABLES] = _address(page_tables)
        context[table.IDS_ADDRESS] = _address(batch.ids)
        context[table.OUTPUT_ADDRESS] = _address(batch.outputs)
        context[table.CANCEL] = _address(flag.cell)
        context[table.DELAY] = self.delay_seed

        self._play(self._program.records, context)
        return None if flag.is_set else logits

    def _pack_more(self, rows: int, cancel: CancelFlag) -> None:
        """Go on with what `load` left; not before the first forward, which somebody waits for."""
        goal = self._packer.done + SLICE * rows if self._used else 0
        self._packer.advance(self._pack, lambda: self._packer.done >= goal, cancel)
        self._used = True

    def _share(self, batch: Batch) -> None:
        """Room for threads that take spans of rows, where there are too few rows for all."""
        rows, (_, nbytes) = len(batch.ids), self._program.partials
        spans = 0
        if rows <= SHARED_ROWS and nbytes:
            spans = -(-(int(batch.positions.max()) + 1) // SPAN)
        if len(self._partials) < rows * spans * nbytes:
            # For twice as many tokens, so that it does not grow with every span.
            self._partials = pages(2 * rows * spans * nbytes)
        self._units[:] = 0
        self._context[table.SPAN_STRIDE] = spans
        self._context[table.PARTIALS] = _address(self._partials)
        self._context[table.UNITS] = _address(self._units)

    def _pack(self, records: np.ndarray) -> None:
        """Play records of packing, which need no barriers and leave nothing to cancel."""
        context = self._context.copy()
        counters = _counters(self.threads, len(records))
        _set_counters(context, counters)
        context[table.OPS] = len(records)
        context[table.CANCEL] = _address(self._never.cell)
        self._play(records, context)

    def _play(self, records: np.ndarray, context: np.ndarray) -> None:
        workers(self._kernels).play(_address(records), _address(context), self.threads)


def check_threads(threads: int | None) -> int:
    """The number of threads to use; raises InvalidInput when it is out of range."""
    if threads is None:
        return processors()
    if type(threads) is not int or not 1 <= threads <= MAX_THREADS:
        raise InvalidInput(
            f"{threads!r} threads were asked for; give a number from 1 to {MAX_THREADS}"
        )
    return threads


def _counters(threads: int, records: int) -> np.ndarray:
    """Zeroed work counters of every thread, each thread's in lines of the cache of their own."""
    padded = -(-records // 8) * 8
    return aligned(2 * threads * padded).view(np.int64).reshape(threads, padded)


def _set_counters(context: np.ndarray, counters: np.ndarray) -> None:
    context[table.COUNTERS], context[table.COUNTERS_STEP] = _address(counters), counters.strides[0]


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def _addresses(arrays: list[np.ndarray]) -> np.ndarray:
    return np.array([array.ctypes.data for array in arrays], np.int64)
