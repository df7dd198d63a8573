"""Every architecture: states that are saved, forked and wound back go on bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

import keelback
import tiny
from harness import memory

#: One of each family, in the type that it was made for.
NAMES = [(name, "q8_0") for name in tiny.VARIANTS if name.endswith("-q8")] + [("kda-pure", "f32")]
LENGTH, CUT = 150, 70


def test_every_family_is_among_them():
    types = {tiny.VARIANTS[name].model_type for name, _ in NAMES}
    assert types >= {*tiny.FAMILIES, "mamba", "mamba2", "gated_deltanet", "granitemoehybrid"}


@pytest.mark.parametrize(("name", "outtype"), NAMES)
def test_a_state_goes_on_from_a_file_from_a_fork_and_from_before(
    tiny_model, tmp_path, name, outtype
):
    model, ids = tiny_model(name, outtype), tiny.ids(name, LENGTH)
    wanted, after = model.forward(ids)
    _, state = model.forward(ids[:CUT])
    earlier, before = state.clone(), memory(state)
    state.save(tmp_path / "state.safetensors")
    model.forward(ids[::-1][:40].copy(), state.clone())
    assert memory(state) == before
    loaded = keelback.State.load(tmp_path / "state.safetensors", model)
    assert memory(loaded) == before
    for start in (state, loaded, earlier):
        got, end = model.forward(ids[CUT:], start)
        assert got.tobytes() == wanted.tobytes() and memory(end) == memory(after)


@pytest.mark.parametrize(("name", "outtype"), NAMES)
def test_what_is_printed_is_what_a_state_takes(tiny_model, name, outtype):
    model = tiny_model(name, outtype)
    _, state = model.forward(tiny.ids(name, 200))
    pages = sum(page.nbytes for page in state.pages)
    assert pages == 256 * model.layout.bytes_per_token  # four whole pages of 64
    assert state.nbytes == model.layout.fixed_bytes + 200 * model.layout.bytes_per_token
    assert np.isfinite(state.block).all()
