"""Paged KV and routing token by token, on a small hybrid: definitions, arrival, and forks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import Machine, Tensors, error_ratio, poison
from keelback.engine.state import CacheView, State
from keelback.models.graph import Graph
from toy_hybrid import VOCABULARY, hybrid

TOLERANCE = 1e-5


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
