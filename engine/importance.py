"""`keelback imatrix`: what the inputs of each weight matrix are over a text, for quantizers.

A pass over the graph puts an op before every matrix product that adds up the squares of its input,
before they are rounded to 8 bits, in a tensor of the sequence's state: so it goes with any model,
and with any number of sequences and rows at once. Text is read, rows are counted and matrices are
chosen as llama.cpp's tools/imatrix does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.formats.imatrix import Importance
from ..kernels.op import catalogue
from ..models.graph import Graph, Node, StateRef
from .backend import MAX_ROWS, Progress
from .model import Model
from .perplexity import begun, rows_at_once
from .state import State

#: By tensor's name, where a state has the sums of its inputs: (matrices, width + 1) each, the
#: number of inputs behind them.
Watched = Mapping[str, list[StateRef]]

#: Layers' tensors; those beside them, the head's among them, are watched on request.
_LAYERS = "blk."


def watch(graph: Graph, head: bool = False) -> Watched:
    """Let a graph, which has no backend yet, sum up what its matrices multiply.

    With `head` the output matrix too, for which every forward has to be asked for all logits.
    """
    watched: dict[str, list[StateRef]] = {}
    shared: dict[Any, StateRef] = {}
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        for slot, operand in node.op.operands.items():
            if operand.against is not None:
                name = node.operands[operand.against].name
                if head or name.startswith(_LAYERS):
                    watched.setdefault(name, []).append(_sums(graph, node, slot, shared))
        graph.nodes.append(node)
    return watched


def _sums(graph: Graph, node: Node, slot: str, shared: dict[Any, StateRef]) -> StateRef:
    """The tensor that sums up an operand; matrices that multiply the same one share it."""
    x, routes, more = node.operands[slot], node.operands.get("routes"), node.attributes
    used, parts = more.get("used", 1), more.get("parts", 1)
    matrices = more.get("experts", 1)
    key = (x, routes, matrices, used, parts)
    if key not in shared:
        shape = matrices, x.width // parts + 1
        shared[key] = graph.state(f"importance.{len(shared)}", *shape)
        attributes = {"matrices": matrices, "used": used, "parts": parts}
        graph.apply(catalogue()["sum_squares"], x, routes, shared[key], **attributes)
    return shared[key]


def collect(
    model: Model,
    watched: Watched,
    chunks: np.ndarray,
    progress: Progress,
    head: bool = False,
    batch: int = MAX_ROWS,
) -> tuple[Importance, bool]:
    """Read chunks (n, size) of ids, each from an empty state, and sum up what `watch` lets see.

    `head`: as it was given to `watch`. Returns the sums, and whether Ctrl-C has ended them early;
    raises KeyboardInterrupt where it has left nothing.
    """
    refs = {ref for found in watched.values() for ref in found}
    totals = {ref: np.zeros(ref.shape) for ref in refs}
    size, done, interrupted = chunks.shape[1], 0, False
    rows = rows_at_once(model.vocabulary, batch) if head else min(batch, MAX_ROWS)
    at_once = max(1, rows // size)
    progress("collecting", 0, len(chunks))
    try:
        for first in range(0, len(chunks), at_once):
            states = _read(model, begun(model, chunks[first : first + at_once]), rows, head)
            # In one statement, so that Ctrl-C leaves whole chunks and their number.
            totals, done = _added(totals, states), done + len(states)
            progress("collecting", done, len(chunks))
    except KeyboardInterrupt:
        if not done:
            raise
        interrupted = True
    return _importance(watched, totals, done, size), interrupted


def _read(model: Model, ids: np.ndarray, rows: int, head: bool) -> list[State]:
    """Read sequences (n, size) beside each other, in forwards of `rows` rows; their states."""
    states: list[Any] = [None] * len(ids)
    step = rows // len(ids)
    for start in range(0, ids.shape[1], step):
        part = list(ids[:, start : start + step])
        _, states = model.forward_batch(part, states, "all" if head else "last")
    return states


def _added(
    totals: Mapping[StateRef, np.ndarray], states: Sequence[State]
) -> dict[StateRef, np.ndarray]:
    return {ref: sum((state.view(ref) for state in states), total) for ref, total in totals.items()}


def _importance(
    watched: Watched, totals: Mapping[StateRef, np.ndarray], chunks: int, size: int
) -> Importance:
    """The totals of each tensor, of all products that it takes part in."""
    found = Importance(chunks=chunks, chunk_size=size)
    for name, refs in watched.items():
        total = np.sum([totals[ref] for ref in refs], axis=0)
        found.sums[name] = total[:, :-1].astype(np.float32)
        found.counts[name] = total[:, -1].astype(np.float32)
    return found


def unseen(importance: Importance) -> list[str]:
    """Sentences about the tensors of which some experts were never asked."""
    found = []
    for name, counts in importance.counts.items():
        if missing := int((counts == 0).sum()):
            found.append(f"{name}: {missing} of {len(counts)} experts were not asked by this text")
    return found


def statistics(path: str | Path) -> list[dict[str, Any]]:
    """A row for each tensor of a file, ready for JSON. Raises InvalidFile for what is no imatrix.

    `mean` and `largest` are of the mean squares of columns; `evenness` is their entropy over that
    of equal ones: 1 where all columns matter alike, 0 where one alone does.
    """
    from ..kernels.formats.imatrix import read

    found, rows = read(path), []
    for name in found.sums:
        squares = found.of(name)[found.counts[name] > 0].astype(np.float64)
        shares = squares[squares > 0] / squares.sum() if squares.any() else np.ones(1)
        entropy = float(-(shares * np.log(shares)).sum())
        rows.append(
            {
                "name": name,
                "matrices": len(found.counts[name]),
                "width": found.sums[name].shape[1],
                "inputs": int(found.counts[name].sum()),
                "unseen": int((found.counts[name] == 0).sum()),
                "mean": float(squares.mean()) if squares.size else 0.0,
                "largest": float(squares.max(initial=0)),
                "evenness": entropy / np.log(squares.size) if squares.size > 1 else 1.0,
            }
        )
    return rows
