"""The promise: the same tokens give the same bits, however they arrived.

In one call or in many, split anywhere, on any number of threads, alone or batched with others:
logits and state are compared as bits, not as numbers. Random pauses (`delay_seed`) make threads
meet in other orders than they would on a quiet machine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import modelfiles
import tiny
from harness import memory, poison
from keelback.engine.model import Model
from keelback.engine.state import State
from keelback.kernels.errors import InvalidInput, NumericalError
from keelback.kernels.formats.blocks import NATIVE
from keelback.kernels.formats.gguf import GGUF

#: One of each family; 96 columns, so that Q8_0 applies.
NAMES = ("mamba-q8", "mamba2-q8", "gdn-q8", "granite-q8")
TYPES = ("q8_0", "f16", "f32")
#: The other native types, Q4_0 or Q4_K with Q6_K or one alone; and every other family once.
MODELS = [(name, kind) for kind in TYPES for name in NAMES] + [
    ("mamba2-q8", "bf16"), ("granite-q8", "bf16"), ("mamba-q8", "q4_0"), ("gdn-q8", "q4_0"),
    ("mamba-q8", "q4_k_m"), ("mamba2-q8", "q4_k_m"), ("gdn-q8", "q4_k_m"), ("kda-pure", "f32"),
    *((NAMES[i % 3], kind) for i, kind in enumerate(modelfiles.PURE)),
    *((name, "q8_0") for name in tiny.VARIANTS if name.endswith("-q8") and name not in NAMES),
]  # fmt: skip
LENGTH = 200
#: Two chunks of 512 rows, and a rest.
LONG = 1100

Read = tuple[np.ndarray, np.ndarray, State]


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@contextmanager
def playing(model: Model, threads: int, delay: int) -> Iterator[Model]:
    """A model with other threads and pauses for a while."""
    backend: Any = model.backend
    before = backend.threads
    backend.threads, backend.delay_seed = threads, delay
    poison(backend)
    try:
        yield model
    finally:
        backend.threads, backend.delay_seed = before, 0


@pytest.fixture(scope="module")
def at_once(tiny_model):
    """(name, type) -> ids, logits of every row and the state after one call on one thread."""

    @cache
    def read(name: str, outtype: str, length: int = LENGTH, skip: int = 0) -> Read:
        ids = tiny.ids(name, skip + length)[skip:]
        with playing(tiny_model(name, outtype), 1, 0) as model:
            return ids, *model.forward(ids, logits="all")

    return read


def pieces(ids: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    """Cut ids before the given positions; those beyond the end cut nothing off."""
    return [part for part in np.split(ids, sorted(cuts)) if len(part)]


cuts_of = st.lists(st.integers(1, LENGTH - 1), max_size=9)
# Not the explain phase: it traces every line, and a kernel compiled under a tracer takes minutes.
arrival = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize(("name", "outtype"), MODELS)
@arrival
@given(cuts=cuts_of, threads=st.integers(1, 3), delay=st.integers(0, 99))
def test_bits_do_not_depend_on_splits_or_threads(
    tiny_model, at_once, name, outtype, cuts, threads, delay
):
    ids, rows, after = at_once(name, outtype)
    with playing(tiny_model(name, outtype), threads, delay) as model:
        state, every = model.new_state(), []
        for part in pieces(ids, cuts):
            logits, state = model.forward(part, state, logits="all")
            every.append(logits)
    assert bits(np.concatenate(every)) == bits(rows)
    assert memory(state) == memory(after)
    assert bits(state.logits) == bits(after.logits)
    assert (state.position, state.digest) == (after.position, after.digest)


@pytest.mark.parametrize(("name", "outtype"), MODELS)
@arrival
@given(
    cuts=st.tuples(cuts_of, cuts_of, cuts_of), turns=st.randoms(use_true_random=False),
    threads=st.integers(1, 3), delay=st.integers(0, 99), logits=st.sampled_from(["last", "all"]),
)  # fmt: skip
def test_bits_do_not_depend_on_company(
    tiny_model, at_once, name, outtype, cuts, turns, threads, delay, logits
):
    spans = ((LENGTH, 0), (61, 200), (17, 270))
    wanted = [at_once(name, outtype, length, skip) for length, skip in spans]
    left = [pieces(ids, cut) for (ids, _, _), cut in zip(wanted, cuts, strict=True)]
    with playing(tiny_model(name, outtype), threads, delay) as model:
        states = [model.new_state() for _ in wanted]
        every: list[list[np.ndarray]] = [[] for _ in wanted]
        while waiting := [i for i in range(3) if left[i]]:
            # Whoever has something left comes along or not, in any order.
            chosen = turns.sample(waiting, turns.randint(1, len(waiting)))
            parts = [left[i].pop(0) for i in chosen]
            rows, _ = model.forward_batch(parts, [states[i] for i in chosen], logits)
            for i, row in zip(chosen, rows, strict=True):
                every[i].append(row)
    for (_, rows, after), state, got in zip(wanted, states, every, strict=True):
        if logits == "all":
            assert bits(np.concatenate(got)) == bits(rows)
        assert bits(got[-1].reshape(-1, got[-1].shape[-1])[-1]) == bits(rows[-1])
        assert memory(state) == memory(after)
        assert bits(state.logits) == bits(after.logits)


@pytest.mark.parametrize(("name", "outtype"), [row for row in MODELS if row[1] != "f32"])
def test_token_by_token_gives_the_bits_of_one_call(tiny_model, at_once, name, outtype):
    ids, rows, after = at_once(name, outtype)
    with playing(tiny_model(name, outtype), 2, 0) as model:
        state = model.new_state()
        for place, (token, row) in enumerate(zip(ids.tolist(), rows, strict=True)):
            # Pauses take long, and a seed makes the same ones at every token.
            model.backend.delay_seed = 0 if place % 8 else place + 1
            logits, state = model.forward([token], state)
            assert bits(logits) == bits(row)
    assert memory(state) == memory(after)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_three_chunks_gives_the_bits_of_pieces_of_37(tiny_model, at_once, name):
    ids, rows, after = at_once(name, "q8_0", LONG)
    with playing(tiny_model(name, "q8_0"), 2, 0) as model:
        state = model.new_state()
        for start in range(0, LONG, 37):
            logits, state = model.forward(ids[start : start + 37], state)
        assert bits(logits) == bits(rows[-1])
        assert memory(state) == memory(after)
        # Asking for the last row only leaves whole chunks without any.
        logits, state = model.forward(ids)
        assert bits(logits) == bits(rows[-1]) and memory(state) == memory(after)


@pytest.mark.parametrize("logits", ["last", "all"])
def test_a_batch_of_more_rows_than_a_chunk_is_cut_inside_a_sequence(tiny_model, at_once, logits):
    wanted = [at_once("gdn-q8", "q8_0", length, length) for length in (300, 701, 1, 60)]
    model = tiny_model("gdn-q8", "q8_0")
    rows, states = model.forward_batch([ids for ids, _, _ in wanted], [None] * 4, logits)
    for row, state, (_, every, after) in zip(rows, states, wanted, strict=True):
        assert bits(row) == bits(every if logits == "all" else every[-1])
        assert memory(state) == memory(after) and state.position == after.position


def test_progress_counts_the_ids_of_every_chunk(tiny_model):
    told: list[int] = []
    tiny_model("mamba-q8", "q8_0").forward(tiny.ids("mamba-q8", LONG), progress=told.append)
    assert told == [512, 1024, 1100]


@pytest.mark.parametrize("name", NAMES)
def test_a_clone_goes_its_own_way(tiny_model, at_once, name):
    model = tiny_model(name, "q8_0")
    ids, rows, after = at_once(name, "q8_0")
    _, state = model.forward(ids[:120])
    fork, before = state.clone(), memory(state)
    other, _ = model.forward(ids[:9][::-1].copy(), fork)
    assert memory(state) == before and state.position == 120 and fork.position == 129
    logits, state = model.forward(ids[120:], state)
    assert bits(logits) == bits(rows[-1]) and memory(state) == memory(after)
    straight, _ = model.forward(np.concatenate([ids[:120], ids[:9][::-1]]))
    assert bits(other) == bits(straight)


def test_calls_from_four_threads_give_the_bits_of_one_after_another(tiny_model, at_once):
    model = tiny_model("mamba2-q8", "q8_0")
    wanted = [at_once("mamba2-q8", "q8_0", 90, 7 * i) for i in range(4)]
    got: list[tuple[np.ndarray, State] | None] = [None] * 4
    start = threading.Barrier(4)

    def read(i: int) -> None:
        start.wait()
        state = model.new_state()
        for token in wanted[i][0]:
            logits, state = model.forward([int(token)], state)
        got[i] = logits, state

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, (_, rows, after) in zip(got, wanted, strict=True):
        assert result is not None
        assert bits(result[0]) == bits(rows[-1]) and memory(result[1]) == memory(after)


# ---- what is refused


def test_a_state_cannot_serve_two_sequences_at_once(tiny_model):
    model = tiny_model("mamba-q8", "q8_0")
    state = model.new_state()
    with pytest.raises(InvalidInput, match="same state"):
        model.forward_batch([[1], [2]], [state, state])
    assert state.position == 0 and not state.block.any()


def test_a_state_of_another_model_is_refused(tiny_model):
    state = tiny_model("mamba2-q8", "q8_0").new_state()
    for name, outtype in (("mamba-q8", "q8_0"), ("mamba2-q8", "f16")):
        with pytest.raises(InvalidInput, match="another model"):
            tiny_model(name, outtype).forward([1], state)


NO_IDS = ([-1], [97], [3, 97, 3], [], [[1, 2]], [1.0], ["1"], [2**63 + 1], np.int64(3), [True])


@pytest.mark.parametrize("ids", NO_IDS)
def test_ids_that_are_no_ids_are_refused_and_leave_the_state_alone(tiny_model, ids):
    model = tiny_model("gdn-q8", "q8_0")
    _, state = model.forward([1, 2, 3])
    before = memory(state)
    with pytest.raises(InvalidInput):
        model.forward(ids, state)
    assert memory(state) == before and state.position == 3


def test_batches_need_a_state_for_each_sequence(tiny_model):
    model = tiny_model("gdn-q8", "q8_0")
    for ids, states in (([], []), ([[1]], []), ([[1], [2]], [None])):
        with pytest.raises(InvalidInput):
            model.forward_batch(ids, states)
    with pytest.raises(InvalidInput, match="last"):
        model.forward([1], logits="some")


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_logits_that_are_not_finite_are_an_error_and_leave_the_state_alone(tiny_model, backend):
    model = tiny_model("mamba2-q8", "q8_0", backend)
    _, state = model.forward([1, 2, 3])
    state.tensors()["blk.1.ssm"].fill(np.inf)
    before, logits = memory(state), bits(state.logits)
    with pytest.raises(NumericalError, match="not finite"):
        model.forward([4, 5, 6, 7], state)
    assert memory(state) == before and state.position == 3 and bits(state.logits) == logits


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_a_state_that_a_single_token_has_spoilt_is_refused_afterwards(tiny_model, backend):
    # No copy is kept for one token, so there is nothing to go back to.
    model = tiny_model("mamba2-q8", "q8_0", backend)
    _, state = model.forward([1, 2, 3])
    kept = state.clone()
    state.tensors()["blk.1.ssm"].fill(np.inf)
    with pytest.raises(NumericalError, match="not finite"):
        model.forward([4], state)
    for spoilt in (state, state.clone()):
        with pytest.raises(InvalidInput, match="earlier copy"):
            model.forward([4], spoilt)
    assert model.forward([4], kept)[1].position == 4


def test_every_native_type_is_covered(tiny_file):
    found = {info.block for row in MODELS for info in GGUF(tiny_file(*row)).tensors.values()}
    assert found == NATIVE
