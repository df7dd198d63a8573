"""Every compiled kernel against its op's definition, alone in a graph.

A row's error is an L2 ratio: what is left is the order of sums and the last bits of exp, so the
tolerance is a few float32 roundings and does not grow with the sizes. Threads and random pauses
must not change a bit, of the output or of the state.
"""

from __future__ import annotations

import importlib

import kernel_cases  # noqa: F401
import numpy as np
import pytest
import weight_cases  # noqa: F401
from cases import CASES, normal

from harness import Case, Machine, Played, Tensors, error_ratio, no_notice, poison
from keelback.engine.backend import MAX_ROWS
from keelback.engine.lowering import lower
from keelback.engine.state import Layout
from keelback.engine.weights import WeightStore
from keelback.kernels import jit
from keelback.kernels.experts import SIGMOID, SOFTMAX
from keelback.kernels.formats.blocks import BF16, F16, F32, NATIVE, QUANTIZED
from keelback.kernels.op import FAMILIES, ShapeError, catalogue
from keelback.models.graph import Graph

TOLERANCE = 2e-6
#: Where a state is rounded a last bit may make a step of it, which later tokens then carry on: such
#: steps are few, up to three in a case on processors without a fused multiply-add.
ROUNDED = {"bf16": 6e-4, "int8": 1e-2}


@pytest.mark.parametrize("name", CASES)
def test_kernel_agrees_with_its_definition_whatever_the_threads(name):
    tried = CASES[name]
    defined = tried.play(tried.machine("numpy"))
    machine, tolerance = tried.machine(), ROUNDED.get(tried.state_type.kernel, TOLERANCE)
    alone = tried.play(machine)
    if tried.op.name == "quantize":
        # Bytes and scales in float32 slots, for which there is one right answer.
        assert np.array_equal(alone.rows.view(np.uint8), defined.rows.view(np.uint8))
    elif tried.op.name == "route":
        used = tried.attributes["used"]
        assert np.array_equal(alone.rows[:, :used], defined.rows[:, :used])
        assert error_ratio(alone.rows[:, used:], defined.rows[:, used:]) < TOLERANCE
    else:
        assert error_ratio(alone.rows, defined.rows) < tolerance
    for got, want in zip(alone.tensors, defined.tensors, strict=True):
        for name in want:
            assert error_ratio(got[name].reshape(1, -1), want[name].reshape(1, -1)) < tolerance
    for got, want in zip(alone.cached, defined.cached, strict=True):
        assert np.array_equal(got, want)
    for threads in (1, 2, 3):
        for delay in (0, 1, 2):
            assert tried.play(machine, threads, delay).same_bits(alone), (threads, delay)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "weight" in case.weights])
def test_weights_that_stay_as_they_are_give_the_same_bits(name):
    tried = CASES[name]
    packed = tried.play(tried.machine())
    for threads in (1, 3):
        assert tried.play(tried.machine(repack=False), threads).same_bits(packed)


def _in_pieces(tried: Case, machine: Machine, cuts: np.random.Generator) -> Played:
    """A case in many forwards, its sequences cut at random."""
    count, states = len(tried.lengths), tried.begin(machine)
    parts = np.split(np.arange(sum(tried.lengths)), np.cumsum(tried.lengths)[:-1])
    left = [np.split(ids, np.flatnonzero(cuts.random(len(ids)) < 0.2)) for ids in parts]
    rows: list[list[np.ndarray]] = [[] for _ in parts]
    while any(left):
        poison(machine.backend)
        here = [i for i in range(count) if left[i] and cuts.random() < 0.7]
        pieces = {i: left[i].pop(0) for i in here}
        here = [i for i in here if len(pieces[i])]
        if here:
            ids, beside = [pieces[i] for i in here], [states[i] for i in here]
            found = np.split(machine.forward(ids, beside), np.cumsum([len(p) for p in ids])[:-1])
            for i, part in zip(here, found, strict=True):
                rows[i].append(part)
    whole = np.concatenate([part for parts in rows for part in parts])
    return Played(whole, [state.block for state in states], [], [])


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith(("expert", "recurrence", "sum"))]
)
def test_pieces_give_the_bits_of_one_forward(name):
    tried = CASES[name]
    machine = tried.machine()
    whole, random = tried.play(machine), np.random.default_rng(len(name))
    for _ in range(3):
        assert _in_pieces(tried, machine, random).same_bits(whole)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gating", [SOFTMAX, SIGMOID])
def test_a_router_names_different_experts_whatever_the_scores(gating, biased, groups):
    # A number out of range would be read from, or written to, outside of the matrices.
    scores = normal(52, 8, 40)
    for row, value in enumerate((np.nan, np.inf, -np.inf, np.finfo(np.float32).min, 1e-45)):
        scores[row] = value
    scores[5, ::3], scores[6, 1::2], scores[7, :39] = np.nan, -np.inf, np.nan
    bias = np.where(np.arange(40) % 7, 0, np.float32(-np.inf))
    tried = Case(
        catalogue()["route"], rows={"scores": scores}, weights={"bias": bias} if biased else {},
        attributes={"used": 12, "gating": gating, "groups": groups, "groups_used": groups // 2 + 1},
        lengths=(8,),
    )  # fmt: skip
    for chosen in tried.play(tried.machine()).rows[:, :12]:
        assert set(chosen) <= set(range(40)) and len(set(chosen)) == 12


def test_cases_cover_every_op_and_every_compiled_variant():
    for family in FAMILIES:
        importlib.import_module(f"keelback.kernels.{family}_cpu")
    # Other tests bring kernels of their own.
    ours = {
        name for name, kernel in jit._KERNELS.items() if kernel.__module__.startswith("keelback.")
    }
    played = set()
    for tried in CASES.values():
        graph, tensors = tried.build()
        for repack in (True, False):
            store = WeightStore(tensors, no_notice, repack)
            layout = Layout.of(graph, tried.types, tried.state_type)
            program = lower(graph, store, layout, MAX_ROWS)
            played |= {name for name, _ in program.kernels}
    assert {tried.op.name for tried in CASES.values()} == set(catalogue())
    packers = {f"pack.{block.name.lower()}" for block in QUANTIZED}
    encoders = {name for name in ours if name.startswith("encode.")}
    assert played == ours - {"post", "lead", "serve", "probe"} - packers - encoders
    assert {F32, F16, BF16} | QUANTIZED == NATIVE


def test_a_matrix_whose_rows_have_another_length_is_refused():
    # With one column the shape [1, 5] has as many numbers as [5, 1], and rows five times as long.
    graph, tensors = Graph(), Tensors()
    row = np.zeros((1, 5), np.float32)
    one = graph.embedding(tensors.add("rows", row.T), width=1)
    with pytest.raises(ShapeError):
        graph.linear(one, tensors.add("wide", row), width=5)
    with pytest.raises(ShapeError):
        graph.embedding(tensors.add("flat", row[0]), width=1)
    assert graph.linear(one, tensors.add("tall", row.T), width=5).width == 5
