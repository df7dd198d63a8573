"""Rearranging weights into panels when a model is loaded: all threads, tensor after tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..kernels import table
from ..kernels.formats.panels import LANES, panel_rows
from .weights import Packing, WeightStore

#: Bytes that are packed before the pages they came from are given back.
STRIDE = 32 << 20

_MODULE = f"{table.__package__}.pack_cpu"


def kernels(packings: Sequence[Packing]) -> list[tuple[str, str]]:
    """(name, module) of the kernel of each packing."""
    return [(f"pack.{packing.info.block.name.lower()}", _MODULE) for packing in packings]


def pack(
    store: WeightStore, addresses: Mapping[str, int], walk: Callable[[np.ndarray], None]
) -> None:
    """Fill the panels that a store has reserved, and give the tensors' own memory back.

    addresses: those of `kernels`. walk: plays an array of records with all threads.
    """
    named = list(zip(store.packings, kernels(store.packings), strict=True))
    while named:
        size, part = 0, []
        while named and size < STRIDE:
            part.append(named.pop(0))
            size += part[-1][0].info.nbytes
        sources = [store.file.data(packing.info) for packing, _ in part]
        walk(
            np.stack(
                [
                    _record(index, packing, addresses[name], source)
                    for index, ((packing, (name, _)), source) in enumerate(
                        zip(part, sources, strict=True)
                    )
                ]
            )
        )
        for packing, _ in part:
            store.file.release(packing.info)
    store.packings.clear()


def _record(index: int, packing: Packing, kernel: int, source: np.ndarray) -> np.ndarray:
    """What a kernel of `pack_cpu.py` reads; matrices of a stack begin a panel each."""
    *stack, rows, width = (1, *packing.info.shape)[-max(2, len(packing.info.shape)) :]
    each = panel_rows(rows) // LANES
    record = np.zeros(table.RECORD, np.int64)
    record[table.KERNEL], record[table.COUNTER] = kernel, index
    record[table.PACK_SOURCE] = source.ctypes.data
    record[table.PACK_TARGET] = packing.target.ctypes.data
    record[table.PACK_ROWS], record[table.PACK_PANELS_EACH] = rows, each
    record[table.PACK_PANELS] = each * math.prod(stack)
    record[table.PACK_BLOCKS] = width // packing.info.block.elements
    return record
