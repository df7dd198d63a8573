"""The embedded model: golden tokens, and the session that writes text with it."""

from __future__ import annotations

import gc
import os
import pydoc
import random
import re
import signal
import sys
import threading
import time
import weakref

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


@pytest.mark.parametrize(
    ("name", "value"),
    [("limit", -1), ("limit", 2.5), ("limit", "3"), ("limit", True), ("stop", [5]), ("stop", 5)],
)
def test_a_limit_or_a_stop_that_is_none_is_refused(demo: keelback.Model, name, value):
    with pytest.raises(keelback.InvalidInput, match=f"{name} is {re.escape(repr(value))}; give"):
        list(demo.generate(PROMPT, **{"limit": 1, name: value}))


def test_a_state_is_shown_in_one_line(demo: keelback.Model):
    assert repr(demo.forward(PROMPT_IDS)[1]) == "State(position=4, damaged=False)"


def test_help_shows_what_is_imported_later_too():
    assert set(keelback.__all__) <= set(dir(keelback))
    page = pydoc.plaintext.document(keelback)
    assert "class Model(" in page and "class Snapshot(" in page
    assert all(name in keelback.__doc__ for name in keelback.__all__)


def test_a_fork_goes_its_own_way_and_the_original_does_not_notice(demo: keelback.Model):
    logits, state = demo.forward(PROMPT_IDS)
    fork = state.clone()
    fork.logits[:] = 0
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


def test_a_session_goes_on_after_a_stop_string(demo: keelback.Model):
    session = keelback.Session(demo, temperature=0, stop="United")
    session.feed(PROMPT)
    assert "".join(session.generate()).endswith("of the ") and session.finish_reason == "stop"
    assert "".join(session.generate(3)) == " States. The" and session.finish_reason == "length"


def test_an_interrupted_session_stays_whole(demo: keelback.Model):
    session = keelback.Session(demo, temperature=0)
    session.interrupt()
    with pytest.raises(KeyboardInterrupt):
        session.feed(PROMPT)
    assert session.state.position == 0
    session.feed(PROMPT)
    session.interrupt()
    assert list(session.generate(5)) == [] and session.finish_reason == "interrupted"
    assert "".join(session.generate(len(GOLDEN_TOKENS))) == GOLDEN_TEXT


def test_one_sessions_interrupt_is_not_anothers(demo: keelback.Model):
    first, second = keelback.Session(demo, seed=1), keelback.Session(demo, seed=1)
    first.interrupt()
    second.feed(PROMPT)
    assert second.state.position == len(PROMPT_IDS)


def test_ctrl_c_never_leaves_a_state_half_advanced(demo: keelback.Model):
    """Signals at random moments: the position is always that of the tokens in the block."""
    ids = list(range(3, 11))
    expected = {}
    state = demo.new_state()
    for turn in range(200):
        expected[state.position] = state.block.copy()
        demo.forward(ids if turn % 2 else ids[:1], state)
    expected[state.position] = state.block.copy()
    state, torn, interrupts = demo.new_state(), 0, 0
    while state.position < max(expected):
        timer = threading.Timer(random.random() * 2e-3, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while state.position < max(expected):
                turn = list(expected).index(state.position)
                demo.forward(ids if turn % 2 else ids[:1], state)
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            interrupts += 1
        torn += not (state.block == expected[state.position]).all()
        if interrupts == 40:
            break
    assert interrupts and not torn


def test_what_a_user_exchanges_never_reaches_a_kernel_unchecked(demo: keelback.Model):
    ids = np.array([5] * 600)
    logits, _ = demo.forward(ids, progress=lambda done: ids.__setitem__(slice(None), 10**12))
    assert np.isfinite(logits).all()
    state = demo.new_state()
    state.block = np.zeros(1, np.float32)
    with pytest.raises(keelback.InvalidInput, match="memory was exchanged"):
        demo.forward([1], state)
    for odd in ([1.5], [[1], [2, 3]], "text", [True, None]):
        with pytest.raises(keelback.InvalidInput):
            demo.forward(odd)


def test_a_thread_that_cannot_be_started_is_an_error_and_not_a_hang(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    model = keelback.load("demo", threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        model.backend.threads = 61
        with pytest.raises(keelback.InvalidInput, match="can't start new thread"):
            model.forward([1])
    with pytest.raises(keelback.InvalidInput, match="threads"):
        keelback.load("demo", threads=1.5)
    assert np.isfinite(keelback.load("demo", threads=2).forward([1])[0]).all()


def test_a_model_is_freed_when_nobody_holds_it():
    model = keelback.load("demo", threads=2)
    model.forward([1, 2, 3])
    gone = weakref.ref(model.backend)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_has_workers_of_its_own(demo: keelback.Model):
    demo.forward([1, 2, 3])
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if np.isfinite(demo.forward([1, 2, 3])[0]).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


class Alarmed(Exception):
    """What a signal handler of the user's raises."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
def test_what_a_signal_handler_raises_waits_for_the_forward_to_end(demo: keelback.Model):
    def ring(*_):
        raise Alarmed

    _, state = demo.forward([1, 2, 3])
    before, kept = signal.signal(signal.SIGALRM, ring), state.block.copy()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(Alarmed):
            demo.forward([5] * 20_000, state)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    position, block = state.position, state.block.copy()
    time.sleep(0.05)
    assert state.position == position and (state.block == block).all()
    assert (position == 3) == (block == kept).all()
    expected = demo.forward([1, 2, 3] + [5] * (position - 3))[1]
    assert (expected.block == block).all()


def test_a_backend_that_fails_leaves_the_state_as_it_was_or_marks_it(tiny_model, monkeypatch):
    model = tiny_model("gdn-gate", "f32", "numpy")
    _, state = model.forward([1, 2, 3])
    kept, calls, play = state.block.copy(), [], model.backend._play

    def fail(*arguments):
        calls.append(1)
        if len(calls) > 25:
            raise MemoryError
        return play(*arguments)

    monkeypatch.setattr(model.backend, "_play", fail)
    with pytest.raises(MemoryError):
        model.forward([4, 5], state)
    assert (state.block == kept).all() and state.position == 3 and not state.damaged
    calls.clear()
    with pytest.raises(MemoryError):
        model.forward([4], state)
    monkeypatch.undo()
    with pytest.raises(keelback.InvalidInput, match="a forward failed in this state"):
        model.forward([4], state)
