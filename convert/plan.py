"""What a conversion is made of: metadata, and tensors that are written one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .checkpoint import Source

Transform = Callable[..., np.ndarray]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the GGUF file: `shape` slowest dimension first.

    Without a transform the one source holds the same numbers in the same order, and is streamed.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    transform: Transform | None = None

    @property
    def always_f32(self) -> bool:
        """Small tensors and those that feed the recurrence stay float32, as in llama.cpp."""
        small = len(self.shape) < 2 or self.name.endswith("_norm.weight")
        return small or "ssm_conv1d" in self.name or not self.name.endswith(".weight")


@dataclass(slots=True)
class Plan:
    """An architecture's answer to a checkpoint: `keys` without their architecture's prefix.

    remarks  sentences about what only keelback can run
    """

    architecture: str
    keys: dict[str, Any]
    tensors: list[Tensor] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        *sources: Source,
        transform: Transform | None = None,
    ) -> None:
        """Add a tensor."""
        self.tensors.append(Tensor(name, shape, sources, transform))


def negative_exp(a_log: np.ndarray) -> np.ndarray:
    """A = -exp(A_log): GGUF holds the decay rate itself."""
    return -np.exp(a_log)
