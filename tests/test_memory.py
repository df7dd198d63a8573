"""Memory that does not grow: a session's is the same after twenty thousand tokens as after two."""

from __future__ import annotations

from pathlib import Path

import pytest

import keelback

STATUS = Path("/proc/self/statm")


@pytest.mark.skipif(not STATUS.exists(), reason="reads resident memory as Linux counts it")
def test_resident_memory_does_not_grow_with_the_text(tiny_model):
    session = keelback.Session(tiny_model("mamba-tied", "f32"), seed=1, ignore_eos=True)
    session.feed([1, 2, 3])
    pages = {}
    for count in range(1, 20_001):
        session.next_token()
        if count in (2_000, 20_000):
            pages[count] = int(STATUS.read_text().split()[1])
    assert session.state.position == 20_002
    assert pages[20_000] <= 1.01 * pages[2_000]
