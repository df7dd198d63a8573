"""Stacks of experts, from the layouts in which checkpoints have them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..kernels.errors import InvalidFile
from .checkpoint import Checkpoint
from .config import Config
from .plan import Part, Plan
from .source import Source

#: What a gated MLP's matrices are called in most checkpoints.
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
#: And in others.
NUMBERED = {"gate": "w1", "up": "w3", "down": "w2"}


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


def experts_used(config: Config, experts: int, default: int) -> int:
    """How many experts a token goes through; InvalidFile where there are not so many."""
    used = config.count("num_experts_per_tok", default)
    if used > experts:
        raise InvalidFile(
            f"{config.path}: num_experts_per_tok is {used}, and there are {experts} experts"
        )
    return used


def expert_groups(config: Config, experts: int, used: int) -> tuple[int, int]:
    """Groups of experts, and of how many of them a token's are chosen.

    Raises InvalidFile for numbers that do not go together.
    """
    groups, chosen = config.count("n_group", 1), config.count("topk_group", 1)
    each = experts // groups
    # Groups are told apart by the best two of each.
    uneven = experts % groups or (groups > 1 and each < 2)
    if uneven or chosen > groups or used > each * chosen:
        raise InvalidFile(
            f"{config.path}: num_experts_per_tok is {used}, which does not go with {experts} "
            f"experts, n_group {groups} and topk_group {chosen}"
        )
    # All of them are no choice, and llama.cpp stops at such a file.
    return (1, 1) if chosen == groups else (groups, chosen)


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
