"""Weights get into panels while a model is loaded, or with its first tokens: it never shows."""

from __future__ import annotations

import gc
import weakref
from itertools import count

import numpy as np
import pytest

from harness import no_notice
from keelback.engine import cpu, packing
from keelback.engine.model import Model
from keelback.engine.threads import CancelFlag, pool
from keelback.engine.weights import WeightStore
from keelback.kernels import table

TEXT = [7, 1, 5, 3, 3, 8, 2, 6, 4, 9, 1, 2]


@pytest.fixture(autouse=True)
def small_strides(monkeypatch):
    monkeypatch.setattr(packing, "STRIDE", 1 << 12)


def stopped(path, tensors: int) -> Model:
    """A model whose loading was stopped after some portions of its tensors."""
    model, asked = Model(path, 2, notice=no_notice, repack=True), count()
    store = WeightStore(model.file, no_notice, repack=True)
    model.backend = cpu.CpuBackend(model.graph, store, model.layout, 2, no_notice)
    model.backend.load(lambda: next(asked) >= tensors)
    return model


def arranged(model: Model) -> int:
    """How many ops read panels."""
    return int(model.backend._program.records[:, table.PANELS].sum())


# Tied embeddings, matrices of many experts, a matrix a head, and attention.
@pytest.mark.parametrize("name", ["mamba2-q8", "mamba-q8", "qwen35-q8", "next-q8", "kimi-q8"])
@pytest.mark.parametrize("tensors", [0, 1, 3])
def test_texts_that_meet_weights_in_the_file_and_in_panels_get_the_same_bits(
    tiny_file, name, tensors, monkeypatch
):
    path = tiny_file(name, "q8_0")
    whole, part = Model(path, 2, notice=no_notice, repack=True), stopped(path, tensors)
    monkeypatch.setattr(cpu, "SLICE", part.backend._packer.total // 6)
    assert arranged(part) < arranged(whole)
    (first, a), (second, b) = (model.forward(TEXT[:3]) for model in (whole, part))
    assert np.array_equal(first, second)
    for token in TEXT[3:]:
        (first, a), (second, b) = whole.forward([token], a), part.forward([token], b)
        assert np.array_equal(first.view(np.uint32), second.view(np.uint32))
    assert np.array_equal(a.block.view(np.uint32), b.block.view(np.uint32))
    assert arranged(part) == arranged(whole)


def test_the_first_forward_does_not_wait_and_later_ones_pack_by_their_rows(tiny_file, monkeypatch):
    model = stopped(tiny_file("mamba2-q8", "q8_0"), 0)
    packer = model.backend._packer
    monkeypatch.setattr(cpu, "SLICE", packer.total // 6)
    _, state = model.forward(TEXT)
    assert packer.done == 0 and arranged(model) == 0
    _, state = model.forward(TEXT[:1], state)
    once = packer.done
    assert 0 < once < packer.total
    model.forward(TEXT, state)
    assert packer.done == packer.total


def test_a_text_that_is_cancelled_while_weights_are_packed_leaves_its_state(tiny_file):
    path = tiny_file("mamba2-q8", "q8_0")
    model, whole = stopped(path, 0), Model(path, 2, notice=no_notice)
    _, state = model.forward(TEXT)
    before, walk, cancel = state.block.copy(), model.backend._pack, CancelFlag()

    def walk_and_cancel(records):
        walk(records)
        cancel.set()

    model.backend._pack = walk_and_cancel
    with pytest.raises(KeyboardInterrupt):
        model.forward(TEXT, state, cancel=cancel)
    model.backend._pack = walk
    assert np.array_equal(state.block, before) and state.position == len(TEXT)
    assert model.backend._packer.done == 0
    expected, _ = whole.forward(TEXT + TEXT)
    found, _ = model.forward(TEXT, state)
    assert np.array_equal(found, expected)


def test_loading_ends_soon_when_it_is_cancelled(tiny_file):
    model, played = stopped(tiny_file("mamba2-q8", "q8_0"), 0), []
    packer, cancel = model.backend._packer, CancelFlag()

    def once(records):
        played.append(len(records))
        model.backend._pack(records)
        cancel.set()

    packer.advance(once, lambda: False, cancel)
    assert len(played) == 1 and packer.done == 0


def test_loading_is_told_when_it_takes_long(tiny_file, monkeypatch):
    path, told = tiny_file("mamba2-q8", "q8_0"), []
    Model(path, 1, progress=lambda *step: told.append(step))
    assert "loading" not in [label for label, *_ in told]
    monkeypatch.setattr(cpu, "PATIENCE", -1)
    Model(path, 1, progress=lambda *step: told.append(step))
    done = [step[1] for step in told if step[0] == "loading"]
    assert len(done) > 3 and done == sorted(done) and done[-1] == told[-1][2]


def test_a_session_starts_when_its_tokenizer_is_ready(monkeypatch):
    asked = []

    class Ready(cpu.CpuBackend):
        def load(self, enough=lambda: False):
            asked.append(enough())
            super().load(lambda: True)

    monkeypatch.setattr(cpu, "CpuBackend", Ready)
    model = Model("demo", 1, text=True)
    assert model.backend._packer.done < model.backend._packer.total and len(asked) == 1
    assert model.tokenizer.decode(model.tokenizer.encode("It was")) == "It was"
    assert np.isfinite(model.forward([1, 2, 3])[0]).all()


def test_a_model_that_is_dropped_leaves_memory_at_once(tiny_file):
    model = Model(tiny_file("mamba2-q8", "q8_0"), 2, notice=no_notice)
    model.forward(TEXT)
    backend = weakref.ref(model.backend)
    gc.disable()
    try:
        del model
        # The pool's thread lets go of what it ran when it goes on to the next.
        pool().call(lambda: None, CancelFlag())
        assert backend() is None
    finally:
        gc.enable()
