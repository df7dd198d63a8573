"""Rewriting a graph before it is played: what a weight's type asks for."""

from __future__ import annotations

from collections.abc import Callable

from ..kernels.formats.blocks import QUANTIZED, BlockFormat
from ..kernels.op import Weight, catalogue
from ..models.graph import Buffer, Graph, Node, Value


def quantize_activations(graph: Graph, block_of: Callable[[Weight], BlockFormat]) -> list[Node]:
    """The graph's nodes, with rows that meet quantized matrices rounded to 8 bits once each."""
    quantize = catalogue()["quantize"]
    rounded: dict[tuple[Value, int], Value] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        operands = dict(node.operands)
        for slot, operand in node.op.operands.items():
            matrix = operands[operand.against] if operand.against else None
            if matrix is None or block_of(matrix) not in QUANTIZED:
                continue
            x, parts = operands[slot], node.attributes[operand.parts] if operand.parts else 1
            if (x, parts) not in rounded:
                width = quantize.shape(x, parts=parts)
                rounded[x, parts] = Value(Buffer(width, x.buffer.outputs), 0, width)
                nodes.append(Node(quantize, {"x": x}, {"parts": parts}, rounded[x, parts]))
            operands[slot] = rounded[x, parts]
        nodes.append(Node(node.op, operands, node.attributes, node.out))
    return nodes
