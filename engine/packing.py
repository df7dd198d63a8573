"""Rearranging weights into panels: all threads, tensor after tensor, as many at a time as is asked.

Kernels read what is not yet in panels from the file, and come to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels import table
from ..kernels.formats.panels import LANES, panel_rows
from .threads import CancelFlag
from .weights import Packing, WeightStore

#: Bytes, about, that are packed before the pages they came from are given back.
STRIDE = 8 << 20
#: Bytes of tensors that are packed last.
LARGE = 32 << 20

_MODULE = f"{table.__package__}.pack_cpu"


def kernels(packings: Sequence[Packing]) -> list[tuple[str, str]]:
    """(name, module) of the kernel of each packing."""
    return [(_kernel(packing), _MODULE) for packing in packings]


def _kernel(packing: Packing) -> str:
    return f"pack.{packing.info.block.name.lower()}"


class Packer:
    """Fills the panels that a store has reserved, and gives the tensors' own memory back.

    addresses: those of `kernels`. placed: told the name of each tensor that is in its panels.

    total, done  bytes of the tensors, in all and in panels so far
    """

    def __init__(
        self,
        store: WeightStore,
        addresses: Mapping[str, int],
        placed: Callable[[str], None],
    ) -> None:
        self._store, self._addresses, self._placed = store, addresses, placed
        # It stops between tensors: so that it never has long to go, large ones come last. The
        # others stay in their order, for the system gives large pages to neighbours.
        store.packings.sort(key=lambda packing: packing.info.nbytes > LARGE)
        self.total, self.done = sum(packing.info.nbytes for packing in store.packings), 0

    def advance(
        self,
        walk: Callable[[np.ndarray], None],
        enough: Callable[[], bool],
        cancel: CancelFlag,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Go on until it is `enough`, which is asked between tensors; or all is done.

        walk: plays an array of records with all threads. `cancel` ends it within a tensor, which is
        then packed anew. `progress` is told bytes.
        """
        left = self._store.packings
        while left and not cancel.is_set and not enough():
            tensors = _some(left)
            for pieces in _portions(tensors):
                walk(np.stack([self._record(i, piece) for i, piece in enumerate(pieces)]))
                for piece in pieces:
                    self._store.file.release(piece.packing.info, piece.start, piece.end)
                if cancel.is_set:
                    return
            del left[: len(tensors)]
            for packing in tensors:
                self._placed(packing.info.name)
                self.done += packing.info.nbytes
            if progress is not None:
                progress(self.done, self.total)

    def _record(self, index: int, piece: _Piece) -> np.ndarray:
        """What a kernel of `pack_cpu.py` reads."""
        info, each = piece.packing.info, panel_rows(piece.rows) // LANES
        record = np.zeros(table.RECORD, np.int64)
        record[table.KERNEL] = self._addresses[_kernel(piece.packing)]
        record[table.COUNTER] = index
        record[table.PACK_SOURCE] = self._store.file.data(info).ctypes.data + piece.start
        record[table.PACK_TARGET] = piece.packing.target.ctypes.data + piece.target
        record[table.PACK_ROWS], record[table.PACK_PANELS_EACH] = piece.rows, each
        record[table.PACK_PANELS] = each * piece.matrices
        record[table.PACK_BLOCKS] = info.shape[-1] // info.block.elements
        return record


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes `start` to `end` of a tensor: some matrices of a stack, or some panels of a matrix."""

    packing: Packing
    start: int
    end: int
    target: int
    rows: int
    matrices: int


def _some(packings: Sequence[Packing]) -> Sequence[Packing]:
    """The first tensors, of STRIDE bytes or more together."""
    size = 0
    for count, packing in enumerate(packings, 1):
        size += packing.info.nbytes
        if size >= STRIDE:
            return packings[:count]
    return packings[:]


def _portions(packings: Sequence[Packing]) -> Iterator[list[_Piece]]:
    """All pieces of tensors, about STRIDE bytes at a time."""
    portion, size = [], 0
    for packing in packings:
        for piece in _pieces(packing):
            portion.append(piece)
            size += piece.end - piece.start
            if size >= STRIDE:
                yield portion
                portion, size = [], 0
    if portion:
        yield portion


def _pieces(packing: Packing) -> Iterator[_Piece]:
    """Cut a tensor into pieces of about STRIDE bytes; matrices of a stack begin a panel each."""
    info = packing.info
    *stack, rows, _ = (1, *info.shape)[-max(2, len(info.shape)) :]
    matrices = math.prod(stack)
    row = info.nbytes // (rows * matrices)
    panel = packing.target.nbytes // (matrices * (panel_rows(rows) // LANES))
    if matrices > 1:
        every, each = rows * row, panel_rows(rows) // LANES * panel
        step = max(1, STRIDE // every)
        for first in range(0, matrices, step):
            count = min(step, matrices - first)
            start = first * every
            yield _Piece(packing, start, start + count * every, first * each, rows, count)
        return
    step = max(1, STRIDE // (LANES * row)) * LANES
    for first in range(0, rows, step):
        count = min(step, rows - first)
        start = first * row
        yield _Piece(packing, start, start + count * row, first // LANES * panel, count, 1)
