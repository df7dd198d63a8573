"""Stacks of experts, from the layouts in which checkpoints have them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .checkpoint import Checkpoint
from .plan import Part, Plan
from .source import Source

#: What a gated MLP's matrices are called in most checkpoints.
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def add_experts(
    result: Plan,
    checkpoint: Checkpoint,
    blk: str,
    prefix: str,
    count: int,
    width: int,
    d_model: int,
    names: Mapping[str, str] = NAMES,
) -> None:
    """Add `ffn_*_exps` of a layer: MLPs of `width`, whose tensors' names begin with `prefix`.

    names: of those of gate, up and down that the model has, what the checkpoint calls them. Found
    are one tensor for each expert (`prefix.7.up_proj.weight`), a stack of all (`prefix.up_proj`),
    and a stack with the rows of the gate above those of up (`prefix.gate_up_proj`).
    """
    for part, theirs in names.items():
        shape = (d_model, width) if part == "down" else (width, d_model)
        target = f"{blk}.ffn_{part}_exps.weight"
        result.add(target, (count, *shape), *_stack(checkpoint, prefix, part, theirs, count, shape))


def _stack(
    checkpoint: Checkpoint, prefix: str, part: str, theirs: str, count: int, shape: tuple[int, int]
) -> list[Part]:
    rows, columns = shape
    whole = _find(checkpoint, f"{prefix}.{theirs}", count, rows, columns)
    if whole is not None:
        # Seen as one matrix, so that it is not read an expert at a time.
        return [Part(whole.reshaped(count * rows, columns))]
    fused = None
    if part != "down":
        fused = _find(checkpoint, f"{prefix}.gate_up_proj", count, 2 * rows, columns)
    if fused is not None:
        return [half(fused, rows, 0 if part == "gate" else 1)]
    need = checkpoint.require
    return [Part(need(f"{prefix}.{i}.{theirs}.weight", rows, columns)) for i in range(count)]


def _find(checkpoint: Checkpoint, name: str, *shape: int) -> Source | None:
    """Stacks are parameters of their own in some releases, and weights of a module in others."""
    found = checkpoint.find(name, *shape)
    return found if found is not None else checkpoint.find(f"{name}.weight", *shape)


def half(both: Source, width: int, index: int) -> Part:
    """Gate (0) or up (1), which lie in one matrix, or in one of each expert: first the gate."""
    rows = np.arange(math.prod(both.shape[:-1])).reshape(-1, 2, width)
    return Part(both.reshaped(rows.size, both.shape[-1]), rows=rows[:, index].reshape(-1))
