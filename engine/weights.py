"""Weights as backends need them: mapped as they are, or converted once at load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.errors import UnsupportedModel
from ..kernels.formats import blocks
from ..kernels.formats.blocks import F16, F32, NATIVE
from ..kernels.formats.gguf import GGUF
from ..kernels.op import Kind, Operand, Weight


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight in memory: `data` holds its bytes, rows of `row_bytes` one after another."""

    data: np.ndarray
    block: blocks.BlockFormat
    row_bytes: int
    width: int


class WeightStore:
    """Gives each operand its weight, converting a tensor at most once per use."""

    def __init__(self, file: GGUF, notice: Callable[[str], None]) -> None:
        self.file = file
        self._stored: dict[tuple[str, Any], Stored] = {}
        # Vectors are float32 for every kernel, so only matrices change.
        matrices = [info for info in file.tensors.values() if len(info.shape) > 1]
        odd = sorted({info.block.name for info in matrices if info.block not in NATIVE})
        if odd:
            notice(f"tensors of type {', '.join(odd)} are widened to F16 in memory")

    def block_of(self, weight: Weight) -> blocks.BlockFormat:
        """The type a matrix has once it is loaded."""
        return weight.block if weight.block in NATIVE else F16

    def get(self, weight: Weight, operand: Operand) -> Stored:
        """The weight as the operand wants it: a native type for a matrix, F32 for a vector."""
        key = (weight.name, operand.kind is Kind.MATRIX or operand.pack)
        if key not in self._stored:
            self._stored[key] = self._load(weight, operand)
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

    def _load(self, weight: Weight, operand: Operand) -> Stored:
        if operand.kind is Kind.MATRIX:
            block = self.block_of(weight)
            data = self.file.data(self.file.tensors[weight.name])
            if block is not weight.block:
                data = self._widened(weight).view(np.uint8).reshape(-1)
            return Stored(data, block, block.row_bytes(weight.width), weight.width)
        values = self._values(weight)
        if operand.pack is not None:
            values = operand.pack(values)
        data = np.ascontiguousarray(values, np.float32)
        return Stored(data.reshape(-1).view(np.uint8), F32, data.shape[-1] * 4, data.size)
