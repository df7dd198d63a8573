"""keelback runs language models whose memory does not grow.

load      opens a model file
Model     a model: `forward` reads ids, `generate` writes text
State     what a sequence has read so far
Session   a conversation with a model
Sampling  how its tokens are chosen
Snapshot  a state and its conversation, to save and to go on from

What a user can mend is a KeelbackError: InvalidFile, InvalidInput, UnsupportedModel or
NumericalError.

model = keelback.load("demo")
for piece in model.generate("To be, or not to be", limit=100, seed=1):
    print(piece, end="")

logits, state = model.forward(model.tokenizer.encode("To be"))
fork = state.clone()
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .kernels.errors import (
    InvalidFile,
    InvalidInput,
    KeelbackError,
    NumericalError,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from .engine.model import Model
    from .engine.sampling import Sampling
    from .engine.session import Session
    from .engine.snapshot import Snapshot
    from .engine.state import State

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

# Where names live that are imported when they are first used, so that `--help` is quick.
_LATER = {
    "Model": "model",
    "Sampling": "sampling",
    "Session": "session",
    "Snapshot": "snapshot",
    "State": "state",
}


def load(
    path: str | Path,
    threads: int | None = None,
    backend: str = "cpu",
    repack: bool | None = None,
    max_ram: str | int | None = None,
    state_type: str = "f32",
) -> Model:
    """Load a GGUF file, or the embedded model "demo".

    threads: default one a processor. backend: "cpu" (compiled kernels) or "numpy" (slow).
    repack: rearrange quantized weights in memory, or compute from the file's pages, with the same
    bits; default as memory allows. max_ram: bytes, or a text as "2G", that must do.
    state_type: how recurrences keep their matrices, "f32", or rounded after every token to
    "bf16" or "int8".
    Raises InvalidFile for a damaged file, UnsupportedModel for an unknown architecture,
    InvalidInput for a model that does not fit into memory.
    """
    from .engine.model import Model

    return Model(path, threads, backend, repack=repack, max_ram=max_ram, state_type=state_type)


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".engine.{_LATER[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
