"""`keelback drift`: what rounding a state does to it, and to what is foretold, as a text gets long.

The same text goes through the model once for each type that states may be kept in, side by side,
the state carried from the first token to the last. Against float32 stand the negative
log-likelihoods of the tokens that came, and the states themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..kernels.errors import InvalidInput
from ..kernels.statetypes import F32, STATE_TYPES
from .backend import Progress
from .model import Model
from .perplexity import compare, ids_of, likelihoods, perplexity_of
from .state import State

#: Tokens of a forward, for the logits of all its rows are wanted.
_ROWS = 128
#: Parts of the text that are told apart, and tokens of a part at least.
PARTS, _LEAST = 20, 64
#: Tokens of a block by which a part's error is found.
_PART_BLOCK = 32

Notice = Callable[[str], None]


@dataclass
class Reader:
    """One type's way through the text."""

    kind: str
    model: Model
    state: State
    losses: list[np.ndarray] = field(default_factory=list)
    errors: list[list[float]] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    def read(self, ids: np.ndarray, targets: np.ndarray) -> None:
        """Go on through the text, `targets` being what comes behind each id."""
        rows, _ = self.model.forward(ids, self.state, logits="all")
        self.losses.append(likelihoods(rows, targets))

    def compare(self, exact: State) -> None:
        """How far the states are from those in float32, relative to these: by tensor and in all."""
        norms, off = [], []
        for held in self.state.layout.states:
            if held.ref in self.model.graph.typed_states:
                wanted = exact.view(held.ref).astype(np.float64)
                off.append(np.square(self.state.view(held.ref) - wanted).sum())
                norms.append(np.square(wanted).sum())
        self.errors.append([_ratio(a, b) for a, b in zip(off, norms, strict=True)])
        self.total.append(_ratio(sum(off), sum(norms)))


def drift(
    path: str,
    text: str,
    kinds: Sequence[str],
    threads: int | None,
    limit: int | None,
    notice: Notice,
    progress: Progress,
) -> dict[str, Any]:
    """Facts about every type in `kinds` and float32, ready for JSON.

    limit: tokens to read at most. Raises InvalidInput for a text that is too short, and for a model
    that has no state to round.
    """
    types = [F32.name, *(kind for kind in STATE_TYPES if kind in kinds and kind != F32.name)]
    # Weights stay in the file: its pages are all the models' together.
    load = partial(Model, path, threads, notice=notice, repack=False)
    first = load(progress=progress)
    names = [ref.name for ref in first.graph.states if ref in first.graph.typed_states]
    if not names:
        raise InvalidInput(f"{path} has no recurrence, so there is no state to round")
    ids = ids_of(first, text)
    ids = ids[: len(ids) if limit is None else limit + 1]
    if len(ids) <= 2 * _LEAST:
        raise InvalidInput(
            f"{len(ids)} tokens are too few, for drift shows in thousands; give a longer text, "
            "or a larger -n"
        )
    models = [first, *(load(state_type=kind) for kind in types[1:])]
    readers = [
        Reader(kind, model, model.new_state()) for kind, model in zip(types, models, strict=True)
    ]
    ends, interrupted = _read(readers, ids, progress)
    return {
        "file": str(first.file.path),
        "tokens": ends[-1],
        "interrupted": interrupted,
        "positions": ends,
        "tensors": names,
        "types": [_facts(reader, readers[0], ends) for reader in readers],
    }


def _read(readers: Sequence[Reader], ids: np.ndarray, progress: Progress) -> tuple[list[int], bool]:
    """Let all read the text; returns where its parts end, and whether Ctrl-C has left some out.

    Raises KeyboardInterrupt where it has left none.
    """
    count = len(ids) - 1
    parts = max(1, min(PARTS, count // _LEAST))
    ends = [count * (part + 1) // parts for part in range(parts)]
    try:
        for start, end in zip([0, *ends], ends, strict=False):
            for at in range(start, end, _ROWS):
                after = min(end, at + _ROWS)
                progress("reading", at, count)
                for reader in readers:
                    reader.read(ids[at:after], ids[at + 1 : after + 1])
            for reader in readers:
                reader.compare(readers[0].state)
    except KeyboardInterrupt:
        # The last reader has compared all of a part when the others have.
        ends = ends[: len(readers[-1].total)]
        if not ends:
            raise
        return ends, True
    progress("reading", count, count)
    return ends, False


def _facts(reader: Reader, exact: Reader, ends: Sequence[int]) -> dict[str, Any]:
    losses = np.concatenate(reader.losses)[: ends[-1]]
    wanted = np.concatenate(exact.losses)[: ends[-1]]
    more = compare(losses, wanted)
    spans = list(zip([0, *ends], ends, strict=False))
    parts = [compare(losses[a:b], wanted[a:b], _PART_BLOCK) for a, b in spans]
    return {
        "type": reader.kind,
        "state_bytes": reader.model.layout.fixed_bytes,
        "perplexity": perplexity_of(losses.mean()),
        "difference": more.mean,
        "difference_error": more.error,
        "perplexity_by_position": [perplexity_of(losses[a:b].mean()) for a, b in spans],
        "difference_by_position": [part.mean for part in parts],
        "difference_error_by_position": [part.error for part in parts],
        "state_error_by_position": reader.total[: len(ends)],
        "state_error_by_tensor": reader.errors[: len(ends)],
    }


def _ratio(off: float, norm: float) -> float:
    return math.sqrt(off / norm) if norm else math.sqrt(off)
