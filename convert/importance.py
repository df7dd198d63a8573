"""An importance matrix beside the tensors that are quantized by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ..kernels.errors import InvalidInput
from ..kernels.formats import imatrix
from ..kernels.formats.metadata import Value

#: Tensors that llama.cpp collects nothing for, unless told to.
_ENDS = ("token_embd.weight", "output.weight")


class Weighing:
    """An importance matrix that was read from a file; raises InvalidFile where that is damaged."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._found = imatrix.read(path)

    def of(
        self, tensors: Iterable[tuple[str, tuple[int, ...]]], notice: Callable[[str], None]
    ) -> dict[str, np.ndarray]:
        """What columns weigh: tensor's name -> float32 (matrices, width).

        tensors: names and shapes of those that are quantized. `notice` is told once how many have
        no entry. Raises InvalidInput for an entry that is of another shape.
        """
        weights, missing = {}, []
        for name, shape in tensors:
            if name not in self._found.sums:
                missing.append(name)
            elif self._found.sums[name].shape == (math.prod(shape[:-2]), shape[-1]):
                weights[name] = self._found.of(name)
            else:
                matrices, width = self._found.sums[name].shape
                raise InvalidInput(
                    f"{self.path} knows {name} as {matrices} x {width} columns, and the model has "
                    f"{math.prod(shape[:-2])} x {shape[-1]}; take the importance matrix of this "
                    "model"
                )
        missing = [name for name in missing if name not in _ENDS]
        if missing:
            notice(
                f"{self.path} has no entry for {len(missing)} of the tensors, {missing[0]} among "
                "them; they are quantized without"
            )
        return weights

    def pairs(self) -> dict[str, Value]:
        """What a quantized model says of it, with llama-quantize's keys."""
        found = self._found
        pairs = {"file": Value.of(self.path.name, "str")}
        if found.datasets:
            pairs["dataset"] = Value.of(found.datasets[0], "str")
        pairs["entries_count"] = Value.of(len(found.sums), "u32")
        pairs["chunks_count"] = Value.of(found.chunks, "u32")
        return {f"quantize.imatrix.{key}": value for key, value in pairs.items()}
