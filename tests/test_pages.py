"""KV pages: the types they keep, what they take, what a fork shares, and the context's end."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import keelback
import tiny
from keelback.engine.footprint import plan
from keelback.engine.model import Model
from keelback.engine.session import Session
from keelback.engine.state import PAGE_ROWS, CacheView

NAME = "granite-q8"
KINDS = ("f32", "f16", "q8_0")
#: How far each type of the cache may move the logits of a tiny random model.
NEAR = {"f32": 1e-6, "f16": 2e-3, "q8_0": 3e-2}


def quiet(text: str) -> None:
    """Tests compile without a word."""


def opened(tiny_file, keys: str, values: str, **settings) -> Model:
    path = tiny_file("granite-q8-32", "f32")
    return Model(path, notice=quiet, cache_type_k=keys, cache_type_v=values, **settings)


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("keys", KINDS)
def test_a_state_of_every_type_goes_on_bit_for_bit_from_a_file(tiny_file, tmp_path, keys, values):
    model, ids = opened(tiny_file, keys, values), tiny.ids("granite-q8-32", 150)
    wanted, _ = model.forward(ids)
    _, state = model.forward(ids[:70])
    state.save(tmp_path / "state.safetensors")
    again = keelback.State.load(tmp_path / "state.safetensors", model)
    got, _ = model.forward(ids[70:], again)
    assert got.tobytes() == wanted.tobytes()
    exact, _ = opened(tiny_file, "f32", "f32").forward(ids)
    far = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert far < max(NEAR[keys], NEAR[values])
    assert (far == 0) == (keys == values == "f32")


def test_a_state_with_other_types_is_refused_with_the_options_it_needs(tiny_file, tmp_path):
    _, state = opened(tiny_file, "q8_0", "f16").forward([1, 2, 3])
    state.save(tmp_path / "state.safetensors")
    said = "--cache-type-k q8_0 --cache-type-v f16"
    with pytest.raises(keelback.InvalidFile, match=said):
        keelback.State.load(tmp_path / "state.safetensors", opened(tiny_file, "f16", "f16"))


def test_a_state_of_latent_rows_names_the_one_type_that_it_has(tiny_file, tmp_path):
    path = tiny_file("kimi-q8", "f32")
    models = [Model(path, notice=quiet, cache_type_k=kind) for kind in ("f16", "f32")]
    _, state = models[0].forward([1, 2, 3])
    state.save(tmp_path / "state.safetensors")
    with pytest.raises(keelback.InvalidFile, match=r"keeps keys as f16; .*--cache-type-k f16$"):
        keelback.State.load(tmp_path / "state.safetensors", models[1])


def test_heads_that_do_not_divide_into_blocks_get_a_sentence(tiny_file):
    path = tiny_file("granite-dense", "f32")  # heads of 8
    with pytest.raises(keelback.InvalidInput, match="heads of 8 values do not divide"):
        Model(path, notice=quiet, cache_type_k="q8_0")
    with pytest.raises(keelback.InvalidInput, match="choose f16, q8_0 or f32"):
        Model(path, notice=quiet, cache_type_v="q4_0")


@pytest.mark.parametrize(("kind", "row"), [("f32", 128), ("f16", 64), ("q8_0", 34)])
def test_pages_take_what_was_said_for_every_token(tiny_file, kind, row):
    # One layer with one head of 32 keys and as many values.
    model, per_token = opened(tiny_file, kind, kind), 2 * row
    assert model.layout.bytes_per_token == per_token
    path = str(tiny_file("granite-q8-32", "f32"))
    types = {"cache_type_k": kind, "cache_type_v": kind}
    found = [plan(path, 1, None, tokens, **types)["bytes"]["cache"] for tokens in (640, 6400)]
    assert found == [640 * per_token, 6400 * per_token]
    _, state = model.forward(tiny.ids("granite-q8-32", 200))
    assert state.nbytes == model.layout.fixed_bytes + 200 * per_token
    assert sum(page.nbytes for page in state.pages) == 256 * per_token


def test_a_fork_of_a_long_text_copies_less_than_a_hundredth_of_its_pages(tiny_model):
    model = tiny_model(NAME, "q8_0")
    state = model.new_state()
    state.reserve(32_000)
    state.position = 31_990
    fork = state.clone()
    own = [b for a, b in zip(state.pages, fork.pages, strict=True) if a is not b]
    assert len(own) == 1 and len(state.pages) == 32_000 // PAGE_ROWS
    assert sum(page.nbytes for page in own) < 0.01 * sum(page.nbytes for page in state.pages)


def test_a_shared_page_is_never_written_to(tiny_model):
    model, ids = tiny_model(NAME, "q8_0"), tiny.ids(NAME, 200)
    _, state = model.forward(ids[:130])
    forks = [state.clone() for _ in range(3)]
    before = [page.tobytes() for page in state.pages]
    ends = [model.forward(ids[130 + i :], fork)[0] for i, fork in enumerate(forks)]
    assert [page.tobytes() for page in state.pages] == before
    alone = model.forward(ids[130:], state)[0]
    assert alone.tobytes() == ends[0].tobytes()
    place = model.layout.caches[0]
    assert len({CacheView(fork, place.ref).read_raw(131)[130].tobytes() for fork in forks}) == 3


def test_a_context_ends_where_it_was_said_to(tiny_file):
    model = opened(tiny_file, "f16", "f16", context=70)
    ids = tiny.ids("granite-q8-32", 80)
    _, state = model.forward(ids[:70])
    with pytest.raises(
        keelback.InvalidInput, match="1 tokens behind 70 that were read, the context 70"
    ):
        model.forward(ids[70:71], state)
    with pytest.raises(
        keelback.InvalidInput, match="the prompt has 80 tokens, the context 70; give a larger"
    ):
        model.forward(ids)
    session = Session(model, ignore_eos=True)
    session.feed(ids[:60])
    # The last token that is chosen need not be read.
    assert len(list(session.generate(50))) <= 11
    assert session.finish_reason == "length" and session.state.position == 70


def test_a_context_does_not_bound_a_state_of_fixed_size(tiny_file):
    model = Model(tiny_file("mamba-tied", "f32"), notice=quiet, context=5)
    model.forward(tiny.ids("mamba-tied", 20))
    with pytest.raises(keelback.InvalidInput, match="context of -1"):
        Model(tiny_file("mamba-tied", "f32"), notice=quiet, context=-1)


def test_the_command_line_takes_types_and_a_context(tiny_file):
    path = tiny_file("granite-q8-32", "q8_0")
    command = [sys.executable, "-m", "keelback.cli", "run", str(path), "-p", "5 7 11", "-n", "9"]
    options = ["-c", "8", "-ctk", "q8_0", "-ctv", "f32", "--temp", "0", "--ignore-eos"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 6  # the sixth is chosen when eight have been read
    few = subprocess.run([*command, "-c", "2"], capture_output=True, text=True)
    assert few.returncode == 1 and "the prompt has 3 tokens, the context 2" in few.stderr
    for limit, told in (("6", False), ("7", True)):
        done = subprocess.run(
            [*command, *options, "-n", limit], capture_output=True, text=True, check=True
        )
        assert ("the context of 8 tokens is full" in done.stderr) == told
