"""Rearranging weights into panels when a model is loaded: all threads, tensor after tensor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels import table
from ..kernels.formats.panels import LANES, panel_rows
from .threads import CancelFlag
from .weights import Packing, WeightStore

#: Bytes, about, that are packed before the pages they came from are given back.
STRIDE = 8 << 20
#: Seconds of packing before progress is told.
PATIENCE = 1.0

_MODULE = f"{table.__package__}.pack_cpu"


def kernels(packings: Sequence[Packing]) -> list[tuple[str, str]]:
    """(name, module) of the kernel of each packing."""
    return [(f"pack.{packing.info.block.name.lower()}", _MODULE) for packing in packings]


def pack(
    store: WeightStore,
    addresses: Mapping[str, int],
    walk: Callable[[np.ndarray], None],
    cancel: CancelFlag,
    progress: Callable[[int, int], None],
) -> None:
    """Fill the panels that a store has reserved, and give the tensors' own memory back.

    addresses: those of `kernels`. walk: plays an array of records with all threads. `cancel` ends
    it soon, half done. `progress` is told bytes when it takes longer.
    """
    total, done, waiting = sum(packing.info.nbytes for packing in store.packings), 0, []
    began, told = time.perf_counter(), False
    for piece in _all_pieces(store.packings, addresses):
        waiting.append(piece)
        done += piece.end - piece.start
        if sum(piece.end - piece.start for piece in waiting) < STRIDE and done < total:
            continue
        _play(store, waiting, walk)
        told = told or time.perf_counter() - began > PATIENCE
        if told:
            progress(done, total)
        if cancel.is_set:
            return
    store.packings.clear()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes `start` to `end` of a tensor: some matrices of a stack, or some panels of a matrix."""

    packing: Packing
    kernel: int
    start: int
    end: int
    target: int
    rows: int
    matrices: int


def _all_pieces(packings: Sequence[Packing], addresses: Mapping[str, int]) -> Iterator[_Piece]:
    for packing, (name, _) in zip(packings, kernels(packings), strict=True):
        yield from _pieces(packing, addresses[name])


def _pieces(packing: Packing, kernel: int) -> Iterator[_Piece]:
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
            yield _Piece(packing, kernel, start, start + count * every, first * each, rows, count)
        return
    step = max(1, STRIDE // (LANES * row)) * LANES
    for first in range(0, rows, step):
        count = min(step, rows - first)
        start = first * row
        yield _Piece(packing, kernel, start, start + count * row, first // LANES * panel, count, 1)


def _play(store: WeightStore, pieces: list[_Piece], walk: Callable[[np.ndarray], None]) -> None:
    """Pack pieces, and give their pages back; empties the list."""
    walk(np.stack([_record(store, index, piece) for index, piece in enumerate(pieces)]))
    for piece in pieces:
        store.file.release(piece.packing.info, piece.start, piece.end)
    pieces.clear()


def _record(store: WeightStore, index: int, piece: _Piece) -> np.ndarray:
    """What a kernel of `pack_cpu.py` reads."""
    info, each = piece.packing.info, panel_rows(piece.rows) // LANES
    record = np.zeros(table.RECORD, np.int64)
    record[table.KERNEL], record[table.COUNTER] = piece.kernel, index
    record[table.PACK_SOURCE] = store.file.data(info).ctypes.data + piece.start
    record[table.PACK_TARGET] = piece.packing.target.ctypes.data + piece.target
    record[table.PACK_ROWS], record[table.PACK_PANELS_EACH] = piece.rows, each
    record[table.PACK_PANELS] = each * piece.matrices
    record[table.PACK_BLOCKS] = info.shape[-1] // info.block.elements
    return record
