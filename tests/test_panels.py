"""Quantized formats in panels: packed as they are defined, and right whatever a block contains."""

from __future__ import annotations

import numpy as np
import pytest
from cases import normal

from harness import Case, Tensors, error_ratio, no_notice
from keelback.engine.cpu import CpuBackend
from keelback.engine.state import Layout
from keelback.engine.weights import WeightStore
from keelback.kernels.formats.blocks import QUANTIZED, BlockFormat, dequantize
from keelback.kernels.formats.finite import not_finite
from keelback.kernels.formats.panels import pack
from keelback.kernels.op import catalogue
from keelback.models.graph import Graph

FORMATS = sorted(QUANTIZED, key=lambda block: block.code)


@pytest.mark.parametrize("block", FORMATS)
@pytest.mark.parametrize("shape", [(16, 256), (1, 512), (37, 256), (3, 21, 256)])
def test_panels_are_packed_as_they_are_defined(block, shape):
    graph, tensors = Graph(), Tensors()
    weight = tensors.add("weight", normal(40, *shape), block)
    rows = graph.embedding(tensors.add("rows", normal(41, 3, 256)), width=256)
    store = WeightStore(tensors, no_notice)
    panels = store.get(weight, catalogue()["linear"].operands["weight"]).panels
    matrix = tensors.add("matrix", normal(42, 16, 256))
    graph.finish(graph.select(graph.linear(rows, matrix, width=16)))
    CpuBackend(graph, store, Layout.of(graph), 2, no_notice).load()
    wanted = pack(tensors.data(tensors.tensors["weight"]), block, shape)
    assert panels is not None and np.array_equal(panels.data, wanted)


def any_blocks(block: BlockFormat, rows: int, width: int) -> np.ndarray:
    """Rows of blocks that are random in every bit, but for scales that are not finite: uint8."""
    random = np.random.default_rng(block.code)
    data = random.integers(0, 256, (rows * width // block.elements, block.nbytes), np.uint8)
    while bad := [i for i, one in enumerate(data) if any(not_finite(memoryview(one), block))]:
        data[bad] = random.integers(0, 256, (len(bad), block.nbytes), np.uint8)
    if block.name == "MXFP4":
        # Sums of the largest are infinite.
        data[:, 0] = random.integers(0, 220, len(data))
    return data.reshape(rows, -1)


@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize("block", FORMATS)
def test_blocks_of_any_bits_are_decoded_and_multiplied(block, repack):
    rows, width = 33, 512
    data = any_blocks(block, rows, width)
    values = dequantize(data.reshape(-1), block, (rows, width))
    # What is no normal number is as good as nothing.
    values[np.abs(values) < np.finfo(np.float32).tiny] = 0
    ids = np.arange(rows)
    table = {"weight": (np.zeros((rows, width), np.float32), block)}
    looked_up = Case(
        catalogue()["embedding"], weights=table, attributes={"width": width}, ids=ids,
        lengths=(rows,), raw={"weight": data},
    )  # fmt: skip
    found = looked_up.play(looked_up.machine(repack=repack)).rows
    assert np.allclose(found, values, rtol=1e-6, atol=1e-37)
    x = normal(43, 13, width)
    met = Case(
        catalogue()["linear"], rows={"x": x}, weights=table, attributes={"width": rows},
        lengths=(13,), raw={"weight": data},
    )  # fmt: skip
    defined = met.play(met.machine("numpy")).rows
    # Every column by itself: a row of the matrix may be far larger than the others.
    for column, wanted in zip(met.play(met.machine(repack=repack)).rows.T, defined.T, strict=True):
        assert error_ratio(column[None], wanted[None]) < 2e-5
