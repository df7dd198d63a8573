"""Weights as backends need them: mapped as they are, rearranged into panels, or converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..kernels.formats import blocks
from ..kernels.formats.blocks import F16, F32, NATIVE, BlockFormat
from ..kernels.formats.gguf import GGUF, TensorInfo
from ..kernels.formats.panels import PANELS, panel_rows
from ..kernels.op import Kind, Operand, Weight
from .platform import pages


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight in memory: `data` holds its bytes, rows of `row_bytes` one after another.

    What is not mapped from the file is reserved only, until the store is asked to `fill` it.
    `panels` is where it can be rearranged to; there, 16 rows take 16 times their `row_bytes`.
    """

    data: np.ndarray
    block: BlockFormat
    row_bytes: int
    width: int
    panels: Stored | None = None


@dataclass(frozen=True, slots=True)
class Packing:
    """A tensor of the file that has still to be rearranged into the panels at `target`."""

    info: TensorInfo
    target: np.ndarray


#: Elements that are widened at once.
_PART = 1 << 20


class WeightStore:
    """Gives each operand its weight: a place in memory, at most one per tensor and use.

    Lowering a graph reads no tensor: places are reserved, which takes no memory yet. `fill` then
    converts what has another type in memory; panels are filled by kernels, see `packing.py`.
    `sizes` counts bytes by what becomes of a tensor: panels, mapped, converted, vectors.
    """

    def __init__(self, file: GGUF, notice: Callable[[str], None], repack: bool = True) -> None:
        self.file, self.repack = file, repack
        self.packings: list[Packing] = []
        self.sizes = dict.fromkeys(("panels", "mapped", "converted", "vectors"), 0)
        self._pending: list[Callable[[], None]] = []
        self._stored: dict[tuple[str, Any], Stored] = {}
        # Vectors are float32 for every kernel, so only matrices change.
        matrices = [info for info in file.tensors.values() if len(info.shape) > 1]
        odd = sorted({info.block.name for info in matrices if info.block not in NATIVE})
        if odd:
            notice(f"tensors of type {', '.join(odd)} are widened to F16 in memory")

    def block_of(self, weight: Weight) -> BlockFormat:
        """The type a matrix has for kernels and definitions: its own, or what it is widened to."""
        return weight.block if weight.block in NATIVE else F16

    def get(self, weight: Weight, operand: Operand) -> Stored:
        """The weight as the operand wants it: a native type for a matrix, F32 for a vector."""
        key = (weight.name, operand.kind is Kind.MATRIX or operand.pack)
        if key not in self._stored:
            matrix = operand.kind is Kind.MATRIX
            self._stored[key] = self._matrix(weight) if matrix else self._vector(weight, operand)
        return self._stored[key]

    def fill(self) -> None:
        """Put vectors and widened matrices into their places."""
        while self._pending:
            self._pending.pop()()

    def floats(self, weight: Weight, kind: Kind) -> np.ndarray:
        """The weight's values as kernels see them, in its own shape: float32."""
        if kind is Kind.VECTOR or weight.block in NATIVE:
            return self._values(weight)
        half = np.empty(weight.size, np.float16)
        self._widen(weight, half)
        return half.reshape(weight.shape).astype(np.float32)

    def _values(self, weight: Weight) -> np.ndarray:
        data = self.file.data(self.file.tensors[weight.name])
        return blocks.dequantize(data, weight.block, weight.shape)

    def _widen(self, weight: Weight, target: np.ndarray) -> None:
        """A matrix whose type has no kernel, as F16; what is too large shows in the logits."""
        info, width = self.file.tensors[weight.name], weight.width
        data, rows = self.file.data(info), max(1, _PART // width)
        step = weight.block.row_bytes(width)
        for first in range(0, weight.size // width, rows):
            part = data[first * step : (first + rows) * step]
            values = blocks.dequantize(part, weight.block, (len(part) // step, width))
            with np.errstate(over="ignore"):
                target[first * width :][: values.size] = values.reshape(-1)
            self.file.release(info, first * step, first * step + len(part))

    def _matrix(self, weight: Weight) -> Stored:
        info, block = self.file.tensors[weight.name], self.block_of(weight)
        panels = self._panels(weight, info) if self.repack and block in PANELS else None
        if block is weight.block:
            data = self.file.data(info)
            self.sizes["mapped"] += data.size if panels is None else 0
        else:
            data = pages(weight.size * 2)
            self.sizes["converted"] += data.size
            self._pending.append(partial(self._widen, weight, data.view(np.float16)))
        return Stored(data, block, block.row_bytes(weight.width), weight.width, panels)

    def _panels(self, weight: Weight, info: TensorInfo) -> Stored:
        target, block = pages(panel_bytes(weight)), PANELS[weight.block].stored
        self.packings.append(Packing(info, target))
        self.sizes["panels"] += target.size
        return Stored(target, block, block.row_bytes(weight.width), weight.width)

    def _vector(self, weight: Weight, operand: Operand) -> Stored:
        """Its values are copied out of the map, where they would hold many pages for few bytes."""
        shape = weight.shape
        if operand.pack is not None:
            shape = operand.pack(np.broadcast_to(np.float32(0), shape)).shape
        data = np.empty(weight.size, np.float32)
        self.sizes["vectors"] += data.nbytes

        def load() -> None:
            values = self._values(weight)
            data[:] = (values if operand.pack is None else operand.pack(values)).reshape(-1)
            self.file.release(self.file.tensors[weight.name])

        self._pending.append(load)
        return Stored(data.view(np.uint8), F32, shape[-1] * 4, data.size)


def panel_bytes(weight: Weight) -> int:
    """Bytes a quantized matrix, or a stack of them, takes in panels."""
    rows = weight.shape[-2] if len(weight.shape) > 1 else 1
    matrices = weight.size // (rows * weight.width)
    row_bytes = PANELS[weight.block].stored.row_bytes(weight.width)
    return matrices * panel_rows(rows) * row_bytes
