"""What a backend does: play a graph over rows that are cut into sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..kernels.errors import InvalidInput
from ..models.graph import Graph
from .state import Layout, State
from .threads import CancelFlag
from .weights import WeightStore

if TYPE_CHECKING:
    from .footprint import Admission

#: Rows a forward takes at most; longer prompts go through in chunks.
MAX_ROWS = 512

#: Told what is being done, the steps done, and the steps in all.
Progress = Callable[[str, int, int], None]


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

    @property
    def positions(self) -> np.ndarray:
        """How many tokens of its sequence come before each row: (T,) int64."""
        spans = zip(self.states, self.offsets, self.offsets[1:], strict=False)
        return np.concatenate(
            [state.position + np.arange(end - first) for state, first, end in spans]
        )


class Backend(Protocol):
    """A way to play a graph."""

    #: Names what the bits depend on: the backend, and its kernels, compiler and processor. Not the
    #: layout of weights, for kernels come to the same bits in all.
    numerics: str

    def load(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Bring the weights into memory, once; `forward` then runs.

        Where it can run on less, it stops when that is `enough`.
        """
        ...

    def forward(self, batch: Batch, cancel: CancelFlag | None = None) -> np.ndarray | None:
        """Advance the states and return logits (R, vocabulary) float32.

        None says that the forward was cancelled, which leaves the states half changed. Called in
        the pool's first thread.
        """
        ...


def make_backend(
    name: str,
    graph: Graph,
    weights: WeightStore,
    layout: Layout,
    threads: int | None,
    notice: Callable[[str], None],
    progress: Progress | None = None,
    admit: Admission | None = None,
) -> Backend:
    """The backend of that name: "cpu" or "numpy". Raises InvalidInput for any other.

    `progress` is told of compiling, and of loading that takes a while; `admit` what the model takes
    in memory, before it is loaded.
    """
    if name == "cpu":
        from .cpu import CpuBackend

        return CpuBackend(graph, weights, layout, threads, notice, progress, admit)
    if name == "numpy":
        from .reference import NumpyBackend

        return NumpyBackend(graph, weights)
    raise InvalidInput(f"there is no backend {name!r}; choose cpu or numpy")
