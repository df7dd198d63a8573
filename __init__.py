"""keelback runs language models whose memory does not grow.

model = keelback.load("demo")
for piece in model.generate("To be, or not to be", limit=100):
    print(piece, end="")

logits, state = model.forward(model.tokenizer.encode("To be"))
fork = state.clone()
"""

from __future__ import annotations

from pathlib import Path

from .engine.model import Model
from .engine.sampling import Sampling
from .engine.session import Session
from .engine.snapshot import Snapshot
from .engine.state import State
from .kernels.errors import (
    InvalidFile,
    InvalidInput,
    KeelbackError,
    NumericalError,
    UnsupportedModel,
)

__all__ = [
    "InvalidFile",
    "InvalidInput",
    "KeelbackError",
    "Model",
    "NumericalError",
    "Sampling",
    "Session",
    "Snapshot",
    "State",
    "UnsupportedModel",
    "load",
]


def load(path: str | Path, threads: int | None = None, backend: str = "cpu") -> Model:
    """Load a GGUF file, or the embedded model "demo".

    threads: default one a processor. backend: "cpu" (compiled kernels) or "numpy" (slow).
    Raises InvalidFile for a damaged file, UnsupportedModel for an unknown architecture.
    """
    return Model(path, threads, backend)
