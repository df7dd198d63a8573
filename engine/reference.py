"""The `numpy` backend: plays the definitions one after another, slow and obvious."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernels.op import Kind, Weight
from ..models.graph import Buffer, CacheRef, Graph, Node, StateRef, Value
from .backend import Batch
from .passes import quantize_activations
from .state import CacheView, State, StateView
from .threads import CancelFlag
from .weights import WeightStore


class NumpyBackend:
    """The oracle that the other backends are held against."""

    numerics = "numpy"

    def __init__(self, graph: Graph, weights: WeightStore) -> None:
        assert graph.logits is not None
        self._nodes, self._logits = quantize_activations(graph, weights.block_of), graph.logits
        self._weights = {
            value.name: weights.floats(value, node.op.operands[slot].kind)
            for node in self._nodes
            for slot, value in node.operands.items()
            if isinstance(value, Weight)
        }

    def load(self, enough: Callable[[], bool] = lambda: False) -> None:
        """See Backend; they are there already."""

    def forward(self, batch: Batch, cancel: CancelFlag | None = None) -> np.ndarray | None:
        """See Backend; the flag is looked at between two ops."""
        values: dict[Buffer, np.ndarray] = {}
        with np.errstate(all="ignore"):
            for node in self._nodes:
                if cancel is not None and cancel.is_set:
                    return None
                values[node.out.buffer] = self._play(node, batch, values)
        return values[self._logits.buffer]

    def _play(self, node: Node, batch: Batch, values: dict[Buffer, np.ndarray]) -> np.ndarray:
        if not node.op.stateful:
            operands = [self._operand(value, batch, values) for value in node.operands.values()]
            return node.op.define(*operands, **node.attributes).astype(np.float32, copy=False)
        parts = []
        for i, state in enumerate(batch.states):
            rows = slice(batch.offsets[i], batch.offsets[i + 1])
            operands = [
                StateView(state, value)
                if node.op.operands[slot].typed
                else self._operand(value, batch, values, state, rows)
                for slot, value in node.operands.items()
            ]
            parts.append(node.op.define(*operands, **node.attributes))
        return np.concatenate(parts).astype(np.float32, copy=False)

    def _operand(
        self,
        operand: Any,
        batch: Batch,
        values: dict[Buffer, np.ndarray],
        state: State | None = None,
        rows: slice = slice(None),
    ) -> Any:
        if isinstance(operand, Value):
            return values[operand.buffer][rows, operand.start : operand.start + operand.width]
        if isinstance(operand, Weight):
            return self._weights[operand.name]
        if isinstance(operand, StateRef) and state is not None:
            return state.view(operand)
        if isinstance(operand, CacheRef) and state is not None:
            return CacheView(state, operand)
        given = {Kind.IDS: batch.ids, Kind.OUTPUTS: batch.outputs, Kind.POSITIONS: batch.positions}
        return None if operand is None else given[operand]
