"""The embedded model: golden tokens, and the session that writes text with it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import keelback

PROMPT = "It was the"
PROMPT_IDS = [1, 610, 373, 265]
# The likeliest tokens; no second candidate comes closer than 0.1 on either backend.
GOLDEN_TOKENS = [
    13, 1975, 301, 1974, 277, 782, 1427, 281, 265, 1278, 1232, 1982,
    372, 1618, 580, 1978, 294, 265, 274, 336, 314, 281, 13, 1234,
]  # fmt: skip
GOLDEN_TEXT = "\ncommonwealth of the United States. The Republicans, in the midst of\nthe"


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_the_embedded_model_writes_its_golden_tokens(backend):
    model = keelback.load("demo", backend=backend)
    assert model.tokenizer.encode(PROMPT) == PROMPT_IDS
    session = keelback.Session(model, temperature=0)
    session.feed(PROMPT)
    assert [session.next_token() for _ in GOLDEN_TOKENS] == GOLDEN_TOKENS


def test_generate_streams_text(demo: keelback.Model):
    text = "".join(demo.generate(PROMPT, limit=len(GOLDEN_TOKENS), temperature=0))
    assert text == GOLDEN_TEXT


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(demo: keelback.Model):
    session = keelback.Session(demo, temperature=0, stop=["Constitution", "Republic"])
    session.feed(PROMPT)
    assert "".join(session.generate()) == "\ncommonwealth of the United States. The "
    assert session.finish_reason == "stop"


def test_an_end_of_text_token_ends_the_text_unless_it_is_ignored(demo: keelback.Model):
    eos = demo.tokenizer.eos_id
    session = keelback.Session(demo, logit_bias={eos: 1e4})
    session.feed(PROMPT)
    assert "".join(session.generate()) == "" and session.finish_reason == "eos"
    session = keelback.Session(demo, logit_bias={eos: 1e4}, ignore_eos=True)
    session.feed(PROMPT)
    list(session.generate(3))
    assert session.finish_reason == "length" and session.generated == 3


def test_an_empty_prompt_is_refused(demo: keelback.Model):
    with pytest.raises(keelback.InvalidInput, match="empty"):
        list(demo.generate(""))
    with pytest.raises(keelback.InvalidInput):
        demo.forward([])


def test_a_fork_goes_its_own_way_and_the_original_does_not_notice(demo: keelback.Model):
    logits, state = demo.forward(PROMPT_IDS)
    fork = state.clone()
    demo.forward([5, 6, 7], fork)
    assert state.position == len(PROMPT_IDS) and (state.logits == logits).all()
    again, _ = demo.forward([9], state)
    assert (again == demo.forward([*PROMPT_IDS, 9])[0]).all()


def test_python_calls_per_token_do_not_depend_on_the_number_of_layers(tiny_model):
    def calls(name: str) -> int:
        model = tiny_model(name, "f32")
        _, state = model.forward([1, 2, 3])
        counted = 0

        def count(frame, event, argument):
            nonlocal counted
            counted += event == "call"

        sys.setprofile(count)
        try:
            for _ in range(10):
                model.forward([4], state)
        finally:
            sys.setprofile(None)
        return counted

    two_layers, three_layers = calls("mamba2-g1"), calls("mamba2-sharded")
    assert two_layers == three_layers


def test_logits_that_are_not_finite_are_an_error_and_leave_the_state(tiny_model):
    model = tiny_model("mamba-tied", "f32")
    _, state = model.forward([1, 2, 3])
    before = state.block.copy()
    weights = next(w for w in model.backend._program.weights if w.flags.writeable)
    kept = weights.copy()
    weights.view(np.float32)[:] = np.nan
    try:
        with pytest.raises(keelback.NumericalError, match="not finite"):
            model.forward([4, 5, 6], state)
    finally:
        weights[:] = kept
    assert (state.block == before).all() and state.position == 3
