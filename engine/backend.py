"""What a backend does: play a graph over rows that are cut into sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..kernels.errors import InvalidInput
from ..models.graph import Graph
from .state import State
from .weights import WeightStore

#: Rows a forward takes at most; longer prompts go through in chunks.
MAX_ROWS = 512


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward's input.

    ids      (T,) int64, checked against the vocabulary
    offsets  (n + 1,) int64: sequence i has rows offsets[i] to offsets[i + 1]
    states   one state a sequence, with room for its rows; changed in place
    outputs  (R,) int64: rows whose logits are wanted, ascending
    """

    ids: np.ndarray
    offsets: np.ndarray
    states: Sequence[State]
    outputs: np.ndarray


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward came to.

    logits       (R, vocabulary) float32, or None when it was cancelled
    interrupted  whether Ctrl-C was pressed meanwhile
    """

    logits: np.ndarray | None
    interrupted: bool = False


class Backend(Protocol):
    """A way to play a graph."""

    #: Names what the bits depend on: backend, instruction set, weight layout.
    numerics: str
    #: Whether an exception can end a forward half way; it then needs a copy of the states even
    #: where it reads a single row.
    preemptible: bool

    def forward(self, batch: Batch, cancellable: bool) -> Forward:
        """Advance the states; a cancelled forward leaves them half changed."""
        ...

    def cancel(self) -> None:
        """Ask a cancellable forward that is under way in another thread to end."""
        ...


def make_backend(
    name: str,
    graph: Graph,
    weights: WeightStore,
    threads: int | None,
    notice: Callable[[str], None],
) -> Backend:
    """The backend of that name: "cpu" or "numpy". Raises InvalidInput for any other."""
    if name == "cpu":
        from .cpu import CpuBackend

        return CpuBackend(graph, weights, threads, notice)
    if name == "numpy":
        from .reference import NumpyBackend

        return NumpyBackend(graph, weights)
    raise InvalidInput(f"there is no backend {name!r}; choose cpu or numpy")
