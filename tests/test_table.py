"""The op table and what it carries: paged KV, per-token routing, barriers, cancellation.

Barriers and arena places are held against a brute-force account of every float that is touched.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
import toy_ops_cpu
from harness import Machine, Tensors, error_ratio, no_notice, poison
from keelback.engine.lowering import Program, lower
from keelback.engine.model import Model
from keelback.engine.passes import quantize_activations
from keelback.engine.state import PAGE_ROWS, CacheView, Layout, State
from keelback.engine.threads import CancelFlag
from keelback.engine.weights import WeightStore
from keelback.kernels import table
from keelback.kernels.formats.blocks import F16, F32, BlockFormat
from keelback.kernels.objects import addresses
from keelback.kernels.op import Kind
from keelback.models.blocks import attend
from keelback.models.graph import CacheRef, Graph, Node, StateRef, Value

WIDTH, HEADS, EXPERTS, USED, LAYERS, TAPS, VOCABULARY = 72, 3, 6, 2, 2, 3, 37
#: The expert that the router never picks: its weights are NaN.
SHUNNED = 4
#: Experts whose scores are always the same number.
TIED = (1, 2)
TOLERANCE = 1e-5


class HybridWeights(Tensors):
    """Seeded weights by name."""

    def matrix(self, name: str, *shape: int, block: BlockFormat = F32) -> Any:
        rng = np.random.default_rng(len(self.tensors))
        values = rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
        return self.add(name, values, block)

    def router(self, name: str) -> tuple[Any, Any]:
        rng = np.random.default_rng(len(self.tensors))
        weight = rng.standard_normal((EXPERTS, WIDTH), np.float32)
        bias = rng.standard_normal(EXPERTS, np.float32)
        weight[list(TIED)], bias[list(TIED)] = 0, 0.5
        weight[SHUNNED], bias[SHUNNED] = 0, -1e9
        return self.add(f"{name}.weight", weight), self.add(f"{name}.bias", bias)

    def experts(self, name: str) -> Any:
        rng = np.random.default_rng(len(self.tensors))
        values = rng.standard_normal((EXPERTS, WIDTH, WIDTH), np.float32) / np.float32(WIDTH**0.5)
        values[SHUNNED] = np.nan
        return self.add(name, values)


def hybrid() -> tuple[Graph, Tensors]:
    """Two layers of attention over pages, a convolution with a state, and experts."""
    g, w = Graph(), HybridWeights()
    ones = np.ones(WIDTH, np.float32)
    h = g.embedding(w.matrix("embedding", VOCABULARY, WIDTH), width=WIDTH)
    for i in range(LAYERS):
        x = g.rms_norm(h, w.add(f"{i}.norm", ones), eps=1e-5)
        qkv = g.linear(x, w.matrix(f"{i}.qkv", 3 * WIDTH, WIDTH, block=F16), width=3 * WIDTH)
        q, k, v = g.split(qkv, WIDTH, WIDTH, WIDTH)
        scale = (WIDTH / HEADS) ** -0.5
        o = attend(g, i, q, k, v, heads=HEADS, key_heads=HEADS, scale=scale)
        h = g.add(h, g.linear(o, w.matrix(f"{i}.out", WIDTH, WIDTH, block=F16), width=WIDTH))
        window = g.state(f"{i}.conv", TAPS - 1, WIDTH)
        c = g.causal_conv(h, window, w.matrix(f"{i}.conv", WIDTH, TAPS), taps=TAPS, silu=1)
        x = g.rms_norm(g.add(h, c), w.add(f"{i}.ffn_norm", ones), eps=1e-5)
        routes = g.route(g.linear(x, *w.router(f"{i}.router"), width=EXPERTS), used=USED)
        sizes = {"width": WIDTH, "used": USED, "experts": EXPERTS}
        up = g.expert_linear(x, routes, w.experts(f"{i}.up"), **sizes)
        down = g.expert_linear(g.silu(up), routes, w.experts(f"{i}.down"), parts=USED, **sizes)
        h = g.add(h, g.expert_sum(down, routes, used=USED))
    h = g.rms_norm(g.select(h), w.add("norm", ones), eps=1e-5)
    g.finish(g.linear(h, w.matrix("head", VOCABULARY, WIDTH), width=VOCABULARY))
    return g, w


# Sequences that end before, on and behind the boundaries of pages of 64 tokens.
LENGTHS = (150, 64, 1, 129)
IDS = [np.random.default_rng(i).integers(0, VOCABULARY, n) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine(*hybrid())


@pytest.fixture(scope="module")
def at_once(machine: Machine) -> list[tuple[np.ndarray, State]]:
    """Each sequence alone in one forward on one thread."""
    results = []
    for ids in IDS:
        state = machine.fresh()
        results.append((machine.forward([ids], [state]), state))
    return results


def cached(state: State) -> np.ndarray:
    """The KV rows a state has read, (caches, position, WIDTH)."""
    refs = (place.ref for place in state.layout.caches)
    return np.stack([CacheView(state, ref).read(state.position) for ref in refs])


def test_paged_attention_and_experts_agree_with_their_definitions(at_once):
    oracle = Machine(*hybrid(), "numpy")
    states = [oracle.fresh() for _ in IDS]
    rows = oracle.forward(IDS, states)
    rows = np.split(rows, np.cumsum(LENGTHS)[:-1])
    for want, state, (got, after) in zip(rows, states, at_once, strict=True):
        assert error_ratio(got, want) < TOLERANCE
        after_block, block = (held.block.view(np.float32)[None] for held in (after, state))
        assert error_ratio(after_block, block) < TOLERANCE
        assert error_ratio(cached(after), cached(state)) < TOLERANCE


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(turns=st.randoms(use_true_random=False), threads=st.integers(1, 3), delay=st.integers(0, 99))
def test_pages_and_routing_keep_their_bits_however_the_tokens_arrive(
    machine, at_once, turns, threads, delay
):
    machine.backend.threads, machine.backend.delay_seed = threads, delay
    poison(machine.backend)
    states, read = [machine.fresh() for _ in IDS], [0] * len(IDS)
    every: list[list[np.ndarray]] = [[] for _ in IDS]
    while waiting := [i for i, ids in enumerate(IDS) if read[i] < len(ids)]:
        chosen = turns.sample(waiting, turns.randint(1, len(waiting)))
        parts = []
        for i in chosen:
            step = turns.choice([1, 5, 40, 64, 200])
            parts.append(IDS[i][read[i] : read[i] + step])
            read[i] += len(parts[-1])
        rows = machine.forward(parts, [states[i] for i in chosen])
        ends = np.cumsum([len(part) for part in parts])
        for i, row in zip(chosen, np.split(rows, ends[:-1]), strict=True):
            every[i].append(row)
    for got, state, (rows, after) in zip(every, states, at_once, strict=True):
        assert np.concatenate(got).tobytes() == rows.tobytes()
        assert state.block.tobytes() == after.block.tobytes()
        assert cached(state).tobytes() == cached(after).tobytes()


def test_a_fork_shares_full_pages_and_copies_the_last(machine, at_once):
    machine.backend.threads, machine.backend.delay_seed = 2, 3
    state = machine.fresh()
    machine.forward([IDS[0][:100]], [state])
    fork = state.clone()
    assert fork.pages[0] is state.pages[0] and fork.pages[1] is not state.pages[1]
    before = cached(state).copy()
    machine.forward([IDS[3][:60]], [fork])
    assert np.array_equal(cached(state), before)
    rows = machine.forward([IDS[0][100:]], [state])
    assert rows.tobytes() == at_once[0][0][100:].tobytes()


def test_only_the_chosen_experts_are_read(at_once):
    # The shunned expert's weights are NaN, and everything that is added up came out finite.
    assert all(np.isfinite(rows).all() for rows, _ in at_once)


def test_equal_scores_go_to_the_lowest_expert():
    graph, tensors = Graph(), Tensors()
    scores = graph.embedding(tensors.add("scores", np.float32([[0.5, 2, 2, 2, 0.5]])), width=5)
    graph.finish(graph.select(graph.route(scores, used=2)))
    for backend in ("numpy", "cpu"):
        tried = Machine(graph, tensors, backend)
        assert tried.forward([[0]], [tried.fresh()]).tolist() == [[1, 2, 0.5, 0.5]]


def test_scores_that_are_no_numbers_name_experts_that_exist():
    graph, tensors = Graph(), Tensors()
    scores = np.float32([[np.nan] * 4, [1, np.nan, -np.inf, np.inf], [-np.inf] * 4])
    rows = graph.embedding(tensors.add("scores", scores), width=4)
    graph.finish(graph.select(graph.route(rows, used=3)))
    tried = Machine(graph, tensors)
    for chosen in tried.forward([[0, 1, 2]], [tried.fresh()])[:, :3].tolist():
        assert len(set(chosen)) == 3 and set(chosen) <= {0, 1, 2, 3}


# ---- barriers


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


# ---- cancelled and interrupted forwards


class Held:
    """A model whose forwards stop in the middle, at a kernel that waits to be cancelled."""

    def __init__(self, model: Model) -> None:
        self.model, self.backend = model, model.backend
        self._hold = addresses([("toy_hold", "toy_ops_cpu")], no_notice)["toy_hold"]
        records = self.backend._program.records
        self._record = records[len(records) * 2 // 3]
        self._kernel = self._record[table.KERNEL]
        self._release = np.zeros(1, np.int64)
        self._record[table.ATTRIBUTES + toy_ops_cpu.REPLACED] = self._kernel
        self._record[table.ATTRIBUTES + toy_ops_cpu.RELEASE] = self._release.ctypes.data

    def arm(self) -> None:
        self._record[table.KERNEL] = self._hold

    def disarm(self) -> None:
        self._record[table.KERNEL] = self._kernel

    def release(self) -> None:
        """Let a forward that is held go on."""
        self._release[0] = 1

    def once_changed(self, state: State, act: Callable[[], None]) -> threading.Thread:
        """Do something as soon as the forward under way has begun to change the state."""
        before = state.block.tobytes()

        def watch() -> None:
            end = time.monotonic() + 20
            while state.block.tobytes() == before and time.monotonic() < end:
                time.sleep(0.001)
            act()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread


@pytest.fixture
def held(tiny_file):
    held = Held(Model(tiny_file("gdn-q8", "q8_0"), threads=2, notice=no_notice))
    yield held
    held.disarm()


def interrupt() -> None:
    """What Ctrl-C does; the handler runs in the main thread."""
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("way", ["Ctrl-C", "flag"])
def test_a_cancelled_forward_leaves_the_state_as_before_its_chunk(held, way):
    model, ids = held.model, tiny.ids("gdn-q8", 900)
    wanted, after = model.forward(ids)
    _, chunk = model.forward(ids[:512])
    state, watchers, cancel = model.new_state(), [], CancelFlag()

    def read_first_chunk(read: int) -> None:
        held.arm()
        watchers.append(held.once_changed(state, interrupt if way == "Ctrl-C" else cancel.set))

    with pytest.raises(KeyboardInterrupt):
        model.forward(ids, state, progress=read_first_chunk, cancel=cancel)
    watchers[0].join()
    assert state.block.tobytes() == chunk.block.tobytes()
    assert (state.position, state.digest) == (512, chunk.digest)
    held.disarm()
    logits, _ = model.forward(ids[512:], state)
    assert logits.tobytes() == wanted.tobytes() and state.block.tobytes() == after.block.tobytes()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_during_a_single_token_is_raised_behind_it(held):
    model, ids = held.model, tiny.ids("gdn-q8", 20)
    _, after = model.forward(ids)
    _, state = model.forward(ids[:19])

    def interrupt_and_release() -> None:
        interrupt()
        time.sleep(0.05)
        held.release()

    held.arm()
    watcher = held.once_changed(state, interrupt_and_release)
    with pytest.raises(KeyboardInterrupt):
        model.forward(ids[19:], state)
    watcher.join()
    assert state.block.tobytes() == after.block.tobytes()
    assert (state.position, state.digest) == (20, after.digest)
    assert state.logits is not None and state.logits.tobytes() == after.logits.tobytes()
