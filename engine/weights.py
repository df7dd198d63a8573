"""Weights as backends need them: mapped as they are, rearranged into panels, or converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.errors import UnsupportedModel
from ..kernels.formats import blocks
from ..kernels.formats.blocks import F16, F32, NATIVE, BlockFormat
from ..kernels.formats.gguf import GGUF, TensorInfo
from ..kernels.formats.panels import PANELS, panel_rows
from ..kernels.op import Kind, Operand, Weight
from .platform import pages


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight in memory: `data` holds its bytes, rows of `row_bytes` one after another.

    In panels, 16 rows take 16 times `row_bytes`.
    """

    data: np.ndarray
    block: BlockFormat
    row_bytes: int
    width: int


@dataclass(frozen=True, slots=True)
class Packing:
    """A tensor of the file that has still to be rearranged into the panels at `target`."""

    info: TensorInfo
    target: np.ndarray


class WeightStore:
    """Gives each operand its weight, converting a tensor at most once per use.

    With `repack`, panels are only reserved: whoever asked for them fills them (see `packings`).
    """

    def __init__(self, file: GGUF, notice: Callable[[str], None], repack: bool = True) -> None:
        self.file, self.repack = file, repack
        self.packings: list[Packing] = []
        self._stored: dict[tuple[str, Any], Stored] = {}
        # Vectors are float32 for every kernel, so only matrices change.
        matrices = [info for info in file.tensors.values() if len(info.shape) > 1]
        odd = sorted({info.block.name for info in matrices if info.block not in NATIVE})
        if odd:
            notice(f"tensors of type {', '.join(odd)} are widened to F16 in memory")

    def block_of(self, weight: Weight) -> BlockFormat:
        """The type a matrix has for the definitions: its own, or what it is widened to."""
        return weight.block if weight.block in NATIVE else F16

    def stored_block(self, weight: Weight) -> BlockFormat:
        """The type a matrix has in memory."""
        panel = PANELS.get(weight.block) if self.repack else None
        return self.block_of(weight) if panel is None else panel.stored

    def get(self, weight: Weight, operand: Operand) -> Stored:
        """The weight as the operand wants it: a native type for a matrix, F32 for a vector."""
        key = (weight.name, operand.kind is Kind.MATRIX or operand.pack)
        if key not in self._stored:
            load = self._matrix if operand.kind is Kind.MATRIX else self._vector
            self._stored[key] = load(weight, operand)
        return self._stored[key]

    def floats(self, weight: Weight, kind: Kind) -> np.ndarray:
        """The weight's values as kernels see them, in its own shape: float32."""
        if kind is Kind.VECTOR or weight.block in NATIVE:
            return self._values(weight)
        return self._widened(weight).astype(np.float32)

    def _values(self, weight: Weight) -> np.ndarray:
        data = self.file.data(self.file.tensors[weight.name])
        try:
            return blocks.dequantize(data, weight.block, weight.shape)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{self.file.path}: tensor {weight.name}: {error}") from None

    def _widened(self, weight: Weight) -> np.ndarray:
        """A matrix whose type has no kernel, as F16; what is too large shows in the logits."""
        with np.errstate(over="ignore"):
            return self._values(weight).astype(np.float16)

    def _matrix(self, weight: Weight, operand: Operand) -> Stored:
        info, block = self.file.tensors[weight.name], self.stored_block(weight)
        row_bytes = block.row_bytes(weight.width)
        if block is weight.block:
            data = self.file.data(info)
        elif weight.block in NATIVE:
            rows = weight.shape[-2] if len(weight.shape) > 1 else 1
            matrices = weight.size // (rows * weight.width)
            data = pages(matrices * panel_rows(rows) * row_bytes)
            self.packings.append(Packing(info, data))
        else:
            data = self._widened(weight).view(np.uint8).reshape(-1)
        return Stored(data, block, row_bytes, weight.width)

    def _vector(self, weight: Weight, operand: Operand) -> Stored:
        values = self._values(weight)
        if operand.pack is not None:
            values = operand.pack(values)
        data = np.ascontiguousarray(values, np.float32)
        return Stored(data.reshape(-1).view(np.uint8), F32, data.shape[-1] * 4, data.size)
