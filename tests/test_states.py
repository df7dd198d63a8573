"""States in other types than float32: rounded after every token, however the tokens arrived."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import keelback
import tiny
from harness import Machine, Tensors, ctrl_c_at, poison
from keelback.cli import main
from keelback.engine import snapshot as snapshots
from keelback.engine.model import Model
from keelback.engine.state import State
from keelback.engine.weights import WeightStore
from keelback.kernels.statetypes import BF16, F32, INT8, STATE_TYPES, StateType
from keelback.models.graph import Graph

KINDS = ("bf16", "int8")
#: A head's decay, a scan, the delta rule, and decays by key.
NAMES = ("mamba2-q8", "mamba-q8", "gdn-q8", "kda-pure")
BOTH = [(name, kind) for name in NAMES for kind in KINDS]
LENGTH = 90

Load = Callable[..., Model]


@pytest.fixture(scope="module")
def typed(tiny_file) -> Load:
    """(variant, state type, backend) -> a model that tests share."""

    @cache
    def load(name: str, kind: str, backend: str = "cpu") -> Model:
        outtype = "q8_0" if name.endswith("q8") else "f32"
        path = tiny_file(name, outtype)
        return Model(path, 2, backend, notice=lambda text: None, state_type=kind)

    return load


@pytest.fixture(scope="module")
def at_once(typed: Load):
    """(variant, state type) -> ids, logits and the state after one call on one thread."""

    @cache
    def read(name: str, kind: str) -> tuple[np.ndarray, np.ndarray, State]:
        ids = tiny.ids(name, LENGTH)
        model = typed(name, kind)
        model.backend.threads = 1
        return ids, *model.forward(ids, logits="all")

    return read


def same(state: State, other: State) -> bool:
    return (
        state.block.tobytes() == other.block.tobytes()
        and state.logits.tobytes() == other.logits.tobytes()
        and (state.position, state.digest) == (other.position, other.digest)
    )


# ---- arrival


@pytest.mark.parametrize(("name", "kind"), BOTH)
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(
    cuts=st.lists(st.integers(1, LENGTH - 1), max_size=7),
    threads=st.integers(1, 3),
    delay=st.integers(0, 99),
)
def test_bits_do_not_depend_on_splits_threads_or_company(
    typed, at_once, name, kind, cuts, threads, delay
):
    ids, rows, after = at_once(name, kind)
    model: Any = typed(name, kind)
    model.backend.threads, model.backend.delay_seed = threads, delay
    poison(model.backend)
    state, beside, every = model.new_state(), model.new_state(), []
    for part in np.split(ids, sorted(cuts)):
        if len(part):
            (_, found), _ = model.forward_batch([[1, 2], part], [beside, state], "all")
            every.append(found)
    assert np.concatenate(every).tobytes() == rows.tobytes()
    assert same(state, after)


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_token_by_token_gives_the_bits_of_one_call(typed, at_once, name, kind):
    ids, rows, after = at_once(name, kind)
    state = typed(name, kind).new_state()
    for token, row in zip(ids.tolist(), rows, strict=True):
        logits, _ = typed(name, kind).forward([token], state)
        assert logits.tobytes() == row.tobytes()
    assert same(state, after)


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_kernels_agree_with_definitions_over_a_text(typed, at_once, name, kind):
    ids, rows, _ = at_once(name, kind)
    wanted, _ = typed(name, kind, "numpy").forward(ids, logits="all")
    exact = typed(name, "f32").forward(ids, logits="all")[0]
    off, rounded = (np.linalg.norm(other - rows, axis=1).mean() for other in (wanted, exact))
    # A last bit may make a step of rounding; that is far less than what rounding itself does.
    assert 0 < rounded < 0.05 * np.linalg.norm(exact, axis=1).mean()
    assert off < 0.5 * rounded


# ---- what is kept


@pytest.mark.parametrize("kind", KINDS)
def test_forks_and_saved_states_go_on_as_if_nothing_had_been(typed, at_once, kind, tmp_path: Path):
    ids, _, after = at_once("gdn-q8", kind)
    model = typed("gdn-q8", kind)
    _, state = model.forward(ids[:40])
    fork = state.clone()
    state.save(tmp_path / "saved")
    loaded = State.load(tmp_path / "saved", model)
    assert same(loaded, state)
    model.forward(ids[40:][::-1].copy(), fork)
    for copy in (state, loaded):
        model.forward(ids[40:], copy)
        assert same(copy, after)
    assert not same(fork, after)


def test_a_state_of_another_type_is_refused_with_a_remedy(typed, tmp_path: Path):
    saved = {}
    for kind in ("f32", *KINDS):
        model = typed("mamba2-q8", kind)
        _, saved[kind] = model.forward([1, 2, 3])
        saved[kind].save(tmp_path / kind)
    for kind in saved:
        for other in saved.keys() - {kind}:
            with pytest.raises(keelback.InvalidFile, match=f"--state-type {other}"):
                State.load(tmp_path / other, typed("mamba2-q8", kind))
            with pytest.raises(keelback.InvalidInput, match="another model"):
                typed("mamba2-q8", kind).forward([4], saved[other])


def test_a_state_that_no_command_makes_is_refused_with_a_remedy_of_the_library(typed, tmp_path):
    _, state = typed("mamba2-q8", "int8-nearest").forward([1, 2, 3])
    state.save(tmp_path / "nearest")
    with pytest.raises(keelback.InvalidFile, match=r"load\(\.\.\., state_type='int8-nearest'\)"):
        State.load(tmp_path / "nearest", typed("mamba2-q8", "int8"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_that_lies_about_its_type_gets_a_sentence(typed, tmp_path, monkeypatch, kind):
    _, state = typed("mamba2-q8", "f32").forward([1, 2, 3])
    honest = snapshots.Snapshot._facts

    def lying(self) -> str:
        return json.dumps({**json.loads(honest(self)), "state_type": kind})

    monkeypatch.setattr(snapshots.Snapshot, "_facts", lying)
    state.save(tmp_path / "odd")
    with pytest.raises(keelback.InvalidFile, match="a tensor is F32"):
        State.load(tmp_path / "odd", typed("mamba2-q8", kind))


@pytest.mark.parametrize("odd", [5, None, "x" * 5000, ["bf16"]])
def test_a_type_that_is_none_gets_a_short_sentence(typed, tmp_path, monkeypatch, odd):
    _, state = typed("mamba2-q8", "f32").forward([1, 2, 3])
    facts = json.loads(snapshots.Snapshot(state)._facts())
    text = json.dumps({**facts, "state_type": odd})
    monkeypatch.setattr(snapshots.Snapshot, "_facts", lambda self: text)
    state.save(tmp_path / "odd")
    with pytest.raises(keelback.InvalidFile) as caught:
        State.load(tmp_path / "odd", typed("mamba2-q8", "f32"))
    assert len(str(caught.value)) < 400


def test_scales_that_are_not_finite_are_refused(typed, tmp_path):
    model = typed("mamba2-q8", "int8")
    _, state = model.forward([1, 2, 3])
    held = next(held for held in model.layout.states if held.kind is INT8)
    state.raw(held)[0, :4] = np.array([np.inf], np.float32).view(np.uint8)
    state.save(tmp_path / "odd")
    with pytest.raises(keelback.InvalidFile, match="not finite"):
        State.load(tmp_path / "odd", model)


def test_snapshots_from_before_types_are_read_as_float32(typed, tmp_path, monkeypatch):
    model = typed("mamba2-q8", "f32")
    _, state = model.forward([1, 2, 3])
    facts = json.loads(snapshots.Snapshot(state)._facts())
    del facts["state_type"]
    monkeypatch.setattr(snapshots.Snapshot, "_facts", lambda self: json.dumps(facts))
    monkeypatch.setattr(snapshots, "VERSION", 2)
    state.save(tmp_path / "old")
    monkeypatch.undo()
    assert same(State.load(tmp_path / "old", model), state)


@pytest.mark.parametrize("kind", STATE_TYPES)
def test_a_plan_counts_what_a_state_takes(tiny_file, kind):
    path = tiny_file("mamba2-q8", "q8_0")
    model = Model(path, 1, "numpy", notice=lambda text: None, state_type=kind)
    if kind in ("f32", *KINDS):
        done = CliRunner().invoke(main, ["plan", str(path), "--json", "--state-type", kind])
        facts = json.loads(done.stdout)
        assert facts["state_type"] == kind and facts["state_bytes"] == model.layout.fixed_bytes
        assert facts["bytes"]["state"] == model.new_state().block.nbytes
    sizes = {held.ref.name: held for held in model.layout.states}
    heads, rows, columns = sizes["blk.0.ssm"].ref.shape
    each = {"f32": 4 * rows, "bf16": 2 * rows, "int8": rows + 4}[kind.split("-")[0]]
    assert sizes["blk.0.ssm"].nbytes == heads * columns * each
    # Windows of convolutions stay as they are.
    assert sizes["blk.0.conv"].kind is F32


def test_what_is_no_type_is_refused(tiny_file):
    with pytest.raises(keelback.InvalidInput, match="bf16 or int8"):
        Model(tiny_file("mamba-q8", "q8_0"), state_type="f16")


def test_tensors_that_are_copies_cannot_be_written_to(typed):
    tensors = typed("mamba-q8", "bf16").new_state().tensors()
    tensors["blk.0.conv"][:] = 1
    with pytest.raises(ValueError, match="read-only"):
        tensors["blk.0.ssm"][:] = 1


# ---- rounding


@pytest.mark.parametrize("kind", [BF16, INT8])
def test_what_is_rounded_is_right_on_average(kind: StateType):
    values = np.random.default_rng(0).standard_normal((2, 7, 19)).astype(np.float32)
    values[:, 0] = 4  # the largest of its column, so that steps of INT8 are known
    step = 4 / 126.99 if kind is INT8 else np.abs(values) / 128
    found = [kind.decode(kind.encode(values, t), 7, 19) for t in range(2000)]
    assert (np.abs(np.array(found) - values) <= 1.001 * step).all()
    # Of uniform fractions, a mean of 2000 is off by 0.011 steps at most on average.
    assert (np.abs(np.mean(found, axis=0) - values) < 0.06 * step).all()


@pytest.mark.parametrize("kind", STATE_TYPES.values(), ids=STATE_TYPES)
def test_odd_values_are_kept_or_told(kind: StateType):
    values = np.zeros((1, 4, 5), np.float32)
    values[0, :, 0], values[0, 1, 1], values[0, 2, 2] = 1e-38, np.nan, np.inf
    values[0, :, 3] = [-3e38, 3e38, 1, 0]
    with np.errstate(all="ignore"):
        data = kind.encode(values, 3)
    found = kind.decode(data, 4, 5)
    assert np.isnan(found[0, 1, 1]) and not np.isfinite(found[0, 2, 2])
    assert np.isfinite(found[0, :, [0, 3, 4]]).all() and not found[0, :, 4].any()


def _sums(kind: str, count: int) -> np.ndarray:
    """What a state has gathered that never forgets: `count` times 0.01 in 32 columns."""
    graph, tensors = Graph(), Tensors()
    rows = np.tile(np.float32([1, 1, *[0.01] * 32, 0, 1]), (8, 1))
    q, k, v, dt, beta = graph.split(
        graph.embedding(tensors.add("rows", rows), width=36), 1, 1, 32, 1, 1
    )
    state = graph.state("state", 1, 1, 32)
    out = graph.recurrence(
        q, k, v, dt, beta, state, None, None, heads=1, key_heads=1, mapping=0, decay="head",
        erase="none",
    )  # fmt: skip
    graph.finish(graph.select(out))
    machine = Machine(graph, tensors, state_type=STATE_TYPES[kind])
    held = machine.fresh()
    for _ in range(count // 500):
        machine.forward([[0] * 500], [held], np.array([0]))
    return held.tensors()["state"]


def test_a_state_that_is_rounded_to_the_nearest_stops_to_grow_and_a_dithered_one_does_not():
    assert np.allclose(_sums("f32", 2000), 20, rtol=1e-3)
    assert (_sums("bf16-nearest", 2000) < 5).all()
    assert (np.abs(_sums("bf16", 2000) - 20) < 3).all()


# ---- the command line


def test_a_run_says_in_what_type_its_state_is():
    done = CliRunner().invoke(main, ["run", "demo", "It was", "-n", "3", "--state-type", "int8"])
    assert done.exit_code == 0 and " int8 fixed + 0 B per token" in done.stderr


def drift(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["drift", "demo", *arguments])


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text").write_text("To be, or not to be, that is the question. " * 40)
    return str(tmp_path / "text")


def test_drift_compares_types_with_float32(text):
    done = drift("--text", text, "-n", "300", "--state-type", "bf16", "-t", "1", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    exact, rounded = facts["types"]
    assert (exact["type"], rounded["type"]) == ("f32", "bf16")
    assert facts["tokens"] == facts["positions"][-1] == 300 and len(facts["positions"]) == 4
    assert exact["difference"] == 0 and not any(exact["state_error_by_position"])
    assert rounded["difference"] != 0
    assert all(0 < error < 0.1 for error in rounded["state_error_by_position"])
    assert {len(row) for row in rounded["state_error_by_tensor"]} == {len(facts["tensors"])}
    mean = np.log(rounded["perplexity_by_position"]).mean()
    assert np.isclose(mean, np.log(rounded["perplexity"]))


def test_drift_is_a_table_too(text):
    done = drift("-f", text, "-n", "200", "--state-type", "int8-nearest")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert any(line.startswith("int8-nearest") for line in lines)
    assert len([line for line in lines if line.startswith("blk.")]) > 1


def test_ctrl_c_leaves_a_drift_of_the_parts_that_were_read(text, monkeypatch):
    """It comes while the second of two types reads the third part."""
    common = ("-f", text, "--state-type", "bf16", "--json")
    whole = json.loads(drift(*common, "-n", "150").stdout)
    calls = ctrl_c_at(monkeypatch, Model, "forward", 6)
    done = drift(*common, "-n", "300")
    found = json.loads(done.stdout)
    assert done.exit_code == 130 and found.pop("interrupted") and not whole.pop("interrupted")
    assert found == whole
    calls[:] = [1] * 5
    done = drift(*common, "-n", "300")
    assert done.exit_code == 130 and not done.stdout


def test_drift_keeps_no_weights_for_each_type(text, monkeypatch):
    monkeypatch.setattr(WeightStore, "_panels", lambda *_: pytest.fail("panels of its own"))
    assert drift("-f", text, "-n", "200").exit_code == 0


def test_drift_needs_a_text(tmp_path: Path):
    (tmp_path / "short").write_text("To be")
    done = drift("--text", str(tmp_path / "short"))
    assert done.exit_code == 1 and "give a longer text" in done.output
    (tmp_path / "empty").write_text("")
    done = drift("--file", str(tmp_path / "empty"))
    assert done.exit_code == 1 and "empty is empty" in done.output
    done = drift("--file", __file__, "-n", "1")
    assert done.exit_code == 1 and "2 tokens are too few" in done.output and "-n" in done.output
    done = drift()
    assert done.exit_code == 1 and "there is no text" in done.output
    done = drift("--text", str(tmp_path / "none"))
    assert done.exit_code == 1 and "cannot be read" in done.output
