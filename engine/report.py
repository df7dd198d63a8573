"""`keelback quantize --report`: which tensor's new type costs how much, one tensor at a time.

For each, the model reads a text with that tensor rounded and all others as they were. What is told
are the error of its values, how far what the model expects moves (the Kullback-Leibler divergence),
and how far its states are off when the text has been read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.errors import InvalidInput
from ..kernels.formats.gguf import GGUF
from ..kernels.formats.part import TensorInfo
from .backend import Progress
from .cpu import CpuBackend
from .divergence import diverge
from .model import Model
from .perplexity import carried, estimate, ids_of, log_probabilities
from .state import State
from .weights import WeightStore

#: Tokens that are read, and bytes of expectations that are kept of them at most.
TOKENS, _KEPT = 1024, 512 << 20
_FEWEST = 32


@dataclass(frozen=True, slots=True)
class Rounding:
    """A tensor and what it would become.

    type    the name of its new type
    nbytes  bytes in that type
    values  makes its bytes with the rounded values, in the type that it has in the file (uint8),
            and their relative L2 error
    """

    name: str
    type: str
    nbytes: int
    values: Callable[[], tuple[np.ndarray, float]]


class _Replaced:
    """A model file in which one tensor has other bytes."""

    def __init__(self, file: GGUF, name: str, data: np.ndarray) -> None:
        self.tensors, self.metadata, self.path = file.tensors, file.metadata, file.path
        self._file, self._name, self._data = file, name, data

    def data(self, info: TensorInfo) -> np.ndarray:
        """The tensor's bytes: uint8."""
        return self._data if info.name == self._name else self._file.data(info)

    def release(self, info: TensorInfo, start: int = 0, end: int | None = None) -> None:
        """Give back the memory of a tensor's bytes, where they are the file's."""
        if info.name != self._name:
            self._file.release(info, start, end)


def report(
    path: str,
    roundings: Sequence[Rounding],
    text: str,
    threads: int | None,
    notice: Callable[[str], None],
    progress: Progress,
) -> list[dict[str, Any]]:
    """A row for each tensor, ready for JSON; what moves the model's expectations most comes first.

    Raises InvalidInput for a text that is too short.
    """
    model = Model(path, threads, notice=notice, progress=progress, repack=False)
    most = min(TOKENS, _KEPT // (4 * model.vocabulary))
    ids = ids_of(model, text)[: most + 1]
    if len(ids) <= _FEWEST:
        raise InvalidInput(
            f"the text has {len(ids)} tokens; give one of some hundred, which takes in what matters"
        )
    base, exact = _read(model, ids)
    base = [log_probabilities(logits) for logits in base]
    rows = []
    for done, rounding in enumerate(roundings):
        progress("reading", done, len(roundings))
        data, error = rounding.values()
        _replace(model, threads, rounding.name, data)
        rows.append(_row(model, rounding, error, ids, base, exact))
    progress("reading", len(roundings), len(roundings))
    return sorted(rows, key=lambda row: -row["kl"])


def _replace(model: Model, threads: int | None, name: str, data: np.ndarray) -> None:
    """Let the model go on with other bytes for a tensor of its file."""
    file: Any = _Replaced(model.file, name, data)
    # What there is to tell about the weights has been told.
    store = WeightStore(file, lambda text: None, repack=False)
    model.backend = CpuBackend(model.graph, store, model.layout, threads, model.notice)
    model.backend.load()


def _read(model: Model, ids: np.ndarray) -> tuple[list[np.ndarray], State]:
    """Logits of all pieces of a text, and the state behind it."""
    state = model.new_state()
    return [rows.logits for rows in carried(model, ids, state=state)], state


def _row(
    model: Model,
    rounding: Rounding,
    error: float,
    ids: np.ndarray,
    base: list[np.ndarray],
    exact: State,
) -> dict[str, Any]:
    state, found = model.new_state(), []
    for rows, expected in zip(carried(model, ids, state=state), base, strict=True):
        found.append(diverge(rows.logits, expected, rows.targets)[2])
    divergence = estimate(np.concatenate(found))
    return {
        "name": rounding.name,
        "type": rounding.type,
        "bytes": rounding.nbytes,
        "error": error,
        "kl": divergence.mean,
        "kl_error": divergence.error,
        "state_error": _apart(state, exact),
    }


def _apart(state: State, exact: State) -> float:
    """How far states are off, relative to what they should be: 0 for a model without any."""
    off = norm = 0.0
    for name, wanted in exact.tensors().items():
        off += float(np.square(state.tensors()[name].astype(np.float64) - wanted).sum())
        norm += float(np.square(wanted.astype(np.float64)).sum())
    return math.sqrt(off / norm) if norm else 0.0
