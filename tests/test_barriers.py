"""When an op waits for others, and where its buffers lie.

Barriers and arena places are held against a brute-force account of every float that is touched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from harness import Tensors, no_notice
from keelback.engine.lowering import Program, lower
from keelback.engine.passes import quantize_activations
from keelback.engine.state import PAGE_ROWS, Layout
from keelback.engine.weights import WeightStore
from keelback.kernels import table
from keelback.kernels.op import Kind
from keelback.models.graph import CacheRef, Graph, Node, StateRef, Value
from toy_hybrid import hybrid


def waits(graph: Graph, tensors: Tensors, field: int = table.WAIT) -> list[int]:
    """The WAIT flags of all ops but the last, the `select` that graphs end in."""
    program = lower(graph, WeightStore(tensors, no_notice), Layout.of(graph), 4)
    return program.records[:-1, field].tolist()


def inputs(*widths: int) -> tuple[Graph, Tensors, list[Value]]:
    """A graph that begins with embeddings of the given widths."""
    graph, tensors = Graph(), Tensors()
    values = [
        graph.embedding(tensors.add(f"{i}", np.zeros((5, width), np.float32)), width=width)
        for i, width in enumerate(widths)
    ]
    return graph, tensors, values


def test_an_op_waits_for_what_it_reads_and_independent_ops_do_not_wait():
    g, tensors, (x,) = inputs(16)
    a = g.silu(x)  # waits for x
    b = g.sigmoid(x)  # reads with it
    g.finish(g.select(g.add(a, b)))  # add waits for both
    assert waits(g, tensors) == [0, 1, 0, 1]


def test_independent_inputs_are_read_without_a_barrier_between_them():
    g, tensors, (x, y) = inputs(16, 16)
    a, b = g.silu(x), g.silu(y)
    g.finish(g.select(g.add(g.add(a, b), g.add(x, y))))
    assert waits(g, tensors)[:5] == [0, 0, 1, 0, 1]


def test_small_ops_of_one_row_do_not_wait_for_each_other():
    g, tensors, (x,) = inputs(16)
    weight = tensors.add("w", np.zeros((16, 16), np.float32))
    y = g.linear(g.silu(g.sigmoid(x)), weight, width=16)
    g.finish(g.select(g.add(g.silu(y), x)))
    assert waits(g, tensors) == [0, 1, 1, 1, 1, 1]
    assert waits(g, tensors, table.WAIT_ONE) == [0, 1, 0, 1, 1, 0]
    assert waits(g, tensors, table.ALONE) == [0, 1, 1, 0, 1, 1]


def test_an_op_that_takes_over_the_bytes_of_a_buffer_waits_for_its_readers():
    g, tensors, (x, y) = inputs(16, 16)
    g.silu(x)
    b = g.silu(y)  # x is dead, and b would lie in its place while `a` may still read it
    g.finish(g.select(g.add(b, y)))
    assert waits(g, tensors) == [0, 0, 1, 1, 1]


def test_ops_that_share_a_state_wait_for_each_other_and_others_do_not():
    for shared in (False, True):
        g, tensors, (x,) = inputs(16)
        windows = [g.state("a", 1, 16), g.state("b", 1, 16)]
        kept = []
        for i in range(2):
            weight = tensors.add(f"w{i}", np.zeros((16, 2), np.float32))
            kept.append(g.causal_conv(x, windows[0 if shared else i], weight, taps=2, silu=0))
        g.finish(g.select(g.add(*kept)))
        assert waits(g, tensors) == [0, 1, int(shared), 1]


def test_ops_that_share_columns_of_the_pages_wait_for_each_other_and_others_do_not():
    for shared in (False, True):
        g, tensors, (x,) = inputs(16)
        caches = [g.cache(f"{i}", "k", 2, 8) for i in range(2)]
        for cache in (caches[0], caches[0 if shared else 1]):
            g.store(x, cache)
        g.finish(g.select(x))
        assert waits(g, tensors) == [0, 1, int(shared)]


def test_two_ops_whose_threads_share_rows_wait_for_each_other():
    g, tensors, (x,) = inputs(16)
    caches = [g.cache(f"{i}", "k", 2, 8) for i in range(4)]
    sizes = {"heads": 2, "key_heads": 2, "scale": 1.0}
    kept = [g.attention(x, *caches[i : i + 2], **sizes) for i in (0, 2)]
    g.finish(g.select(g.add(*kept)))
    assert waits(g, tensors) == [0, 1, 1, 1]


# ---- an account of every float

MAX_ROWS = 3
Floats = set[tuple[int, int]]


def _floats(value: Any, fields: np.ndarray) -> Floats:
    """(base, float) of all that an operand can touch; weights and ids, only read, do not count."""
    base, offset, step, width = (int(field) for field in fields)
    if isinstance(value, StateRef):
        return {(base, offset // 4 + i) for i in range(value.size)}
    if isinstance(value, CacheRef):
        return {(base, offset // 4 + i) for i in range(PAGE_ROWS * value.heads * step // 4)}
    if not isinstance(value, Value):
        return set()
    assert width == value.width and offset % 4 == step % 4 == 0
    return {(base, (offset + row * step) // 4 + i) for row in range(MAX_ROWS) for i in range(width)}


def _touched(node: Node, record: np.ndarray) -> tuple[Floats, Floats]:
    """What an op reads and what it writes."""
    reads: Floats = set()
    writes: Floats = set()
    operands = [(Kind.ROWS, node.out)]
    operands += [(slot.kind, node.operands[name]) for name, slot in node.op.operands.items()]
    for slot, (kind, value) in enumerate(operands):
        at = table.OPERANDS + slot * table.OPERAND_FIELDS
        floats = _floats(value, record[at : at + table.OPERAND_FIELDS])
        reads |= floats if slot else set()
        writes |= floats if not slot or kind in (Kind.STATE, Kind.CACHE) else set()
    return reads, writes


def check_program(graph: Graph, store: WeightStore) -> Program:
    """Ops that no barrier parts never meet, and no value is overwritten before it is read."""
    program = lower(graph, store, Layout.of(graph), MAX_ROWS)
    nodes = quantize_activations(graph, store.block_of)
    assert len(nodes) == len(program.records)
    check_values(program, nodes)
    check_one_row(program, nodes)
    return program


def check_one_row(program: Program, nodes: list[Node]) -> None:
    """Of ops that no barrier of a forward of one row parts, only the first thread's may meet."""
    since: list[tuple[int, Floats, Floats]] = []
    for node, record in zip(nodes, program.records, strict=True):
        reads, writes = _touched(node, record)
        since = [] if record[table.WAIT_ONE] else since
        for alone, read, written in since:
            if not (alone and record[table.ALONE]):
                assert not reads & written and not writes & (read | written), node.op.name
        since.append((record[table.ALONE], reads, writes))


def check_values(program: Program, nodes: list[Node]) -> None:
    """What `check_program` says of a forward of many rows."""
    read: Floats = set()
    written: Floats = set()
    owner: dict[tuple[int, int], int] = {}
    producer = {id(node.out.buffer): index for index, node in enumerate(nodes)}
    for index, (node, record) in enumerate(zip(nodes, program.records, strict=True)):
        reads, writes = _touched(node, record)
        if record[table.WAIT]:
            read, written = set(), set()
        states = {place for place in writes if place[0] in (table.STATE, table.PAGES)}
        assert not reads & writes - states, f"op {index}, {node.op.name}, writes over its input"
        assert not reads & written, f"op {index}, {node.op.name}, may read too early"
        assert not writes & (read | written), f"op {index}, {node.op.name}, may write too early"
        for slot, (name, value) in enumerate(node.operands.items(), 1):
            if isinstance(value, Value):
                at = table.OPERANDS + slot * table.OPERAND_FIELDS
                floats = _floats(value, record[at : at + table.OPERAND_FIELDS])
                owners = {owner.get(place) for place in floats}
                assert owners == {producer[id(value.buffer)]}, (index, node.op.name, name, owners)
        at = table.OPERANDS
        owner |= dict.fromkeys(_floats(node.out, record[at : at + table.OPERAND_FIELDS]), index)
        end = program.arena_bytes // 4
        assert all(place < end for base, place in writes if base == table.ARENA)
        read, written = read | reads, written | writes


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_programs_of_all_models_are_free_of_races_and_keep_live_buffers_apart(
    tiny_model, name, outtype
):
    model = tiny_model(name, "f32", "numpy") if outtype == "f32" else tiny_model(name, outtype)
    check_program(model.graph, WeightStore(model.file, no_notice))


def test_the_hybrid_program_is_free_of_races_and_keeps_live_buffers_apart():
    graph, tensors = hybrid()
    check_program(graph, WeightStore(tensors, no_notice))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_programs_are_free_of_races_and_keep_live_buffers_apart(data):
    widths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    g, tensors, values = inputs(*widths)
    for i in range(data.draw(st.integers(1, 14))):
        x = data.draw(st.sampled_from(values))
        kind = data.draw(st.sampled_from(["silu", "linear", "split", "add", "conv", "norm"]))
        if kind == "split" and x.width > 1:
            cut = data.draw(st.integers(1, x.width - 1))
            values += g.split(x, cut, x.width - cut)
            continue
        if kind == "linear":
            width = data.draw(st.integers(1, 40))
            weight = tensors.add(f"w{i}", np.zeros((width, x.width), np.float32))
            values.append(g.linear(x, weight, width=width))
        elif kind == "add":
            others = [value for value in values if value.width == x.width]
            values.append(g.add(x, data.draw(st.sampled_from(others))))
        elif kind == "conv":
            weight = tensors.add(f"w{i}", np.zeros((x.width, 2), np.float32))
            values.append(g.causal_conv(x, g.state(f"{i}", 1, x.width), weight, taps=2, silu=0))
        else:
            values.append(g.rms_norm(x, eps=1e-5) if kind == "norm" else g.silu(x))
    g.finish(g.select(values[-1]))
    check_program(g, WeightStore(tensors, no_notice))
