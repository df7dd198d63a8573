"""Rewriting a graph before it is played: what a weight's type asks for."""

from __future__ import annotations

from collections.abc import Callable

from ..kernels.formats.blocks import QUANTIZED, BlockFormat
from ..kernels.op import Weight, catalogue
from ..models.graph import Buffer, Graph, Node, Value


def quantize_activations(graph: Graph, block_of: Callable[[Weight], BlockFormat]) -> list[Node]:
    """The graph's nodes, with inputs of quantized matrices rounded to 8 bits once each."""
    quantize, linear = catalogue()["quantize"], catalogue()["linear"]
    rounded: dict[Value, Value] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op is linear and block_of(node.operands["weight"]) in QUANTIZED:
            x = node.operands["x"]
            if x not in rounded:
                width = quantize.shape(x)
                rounded[x] = Value(Buffer(width, x.buffer.outputs), 0, width)
                nodes.append(Node(quantize, {"x": x}, {}, rounded[x]))
            node = Node(linear, {**node.operands, "x": rounded[x]}, node.attributes, node.out)
        nodes.append(node)
    return nodes
