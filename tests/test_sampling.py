"""Sampling steps, their draw, and the stream that turns bytes into text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keelback.engine.sampling import Sampling, sample, uniform
from keelback.engine.stream import TextStream
from keelback.kernels.errors import InvalidInput

PLAIN = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0], np.float32)


def chosen(sampling: Sampling, logits=LOGITS, recent=(), draws: int = 400) -> set[int]:
    return {sample(logits, recent, sampling, position) for position in range(draws)}


def with_(**changes) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **changes})


def test_temperature_zero_takes_the_likeliest_and_the_lowest_id_among_equals():
    assert chosen(with_(temperature=0)) == {1}


def test_top_k_keeps_k_and_breaks_ties_to_the_lowest_id():
    assert chosen(with_(top_k=1)) == {1}
    assert chosen(with_(top_k=2)) == {1, 3}
    assert chosen(with_(top_k=3)) == {1, 2, 3}


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert chosen(with_(top_p=0.5), logits) == {0}
    assert chosen(with_(top_p=0.51), logits) == {0, 1}
    assert chosen(with_(top_p=0.0), logits) == {0}


def test_min_p_drops_what_is_far_below_the_likeliest():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert chosen(with_(min_p=0.4), logits) == {0, 1}


def test_penalties_look_at_the_window_only():
    strong = with_(temperature=0, repeat_penalty=10.0, repeat_last_n=2)
    assert sample(LOGITS, [1, 3], strong, 0) == 2
    assert sample(LOGITS, [1, 0, 4], strong, 0) == 1
    assert sample(LOGITS, [1, 1], with_(temperature=0, frequency_penalty=0.6), 0) == 3
    assert sample(LOGITS, [1, 3], with_(temperature=0, presence_penalty=1.5), 0) == 2


def test_a_penalty_makes_negative_logits_smaller_too():
    logits = np.array([-1.0, -1.1], np.float32)
    assert sample(logits, [0], with_(temperature=0, repeat_penalty=2.0), 0) == 1


def test_logit_bias_adds_and_refuses_unknown_ids():
    assert sample(LOGITS, [], with_(temperature=0, logit_bias={4: 10.0}), 0) == 4
    with pytest.raises(InvalidInput, match="logit_bias names the id 99"):
        sample(LOGITS, [], with_(logit_bias={99: 1.0}), 0)


def test_a_ban_of_every_token_is_refused_and_a_tiny_temperature_takes_the_likeliest():
    ban = {token: float("-inf") for token in range(len(LOGITS))}
    with pytest.raises(InvalidInput, match="bans every token"):
        sample(LOGITS, [], with_(logit_bias=ban), 0)
    del ban[2]
    assert chosen(with_(logit_bias=ban)) == {2}
    assert chosen(with_(temperature=1e-308, logit_bias={2: 5.0})) == {2}


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.7, 0.2, 0.1], np.float32))
    draws = [sample(logits, [], PLAIN, position) for position in range(20_000)]
    assert np.abs(np.bincount(draws) / len(draws) - [0.7, 0.2, 0.1]).max() < 0.015


def test_a_draw_depends_on_seed_and_position_alone():
    assert uniform(5, 9) == uniform(5, 9)
    assert len({uniform(seed, position) for seed in range(30) for position in range(30)}) == 900


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -1.0}, {"top_p": 1.5}, {"top_k": -1}, {"repeat_penalty": 0.0}, {"seed": -1},
     {"temperature": float("nan")}, {"min_p": "much"}, {"top_k": 2.5}, {"seed": 1.5},
     {"repeat_last_n": True}, {"logit_bias": {1: float("nan")}}, {"logit_bias": {1: float("inf")}},
     {"logit_bias": {"one": 1.0}}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InvalidInput, match=next(iter(setting))):
        Sampling(**setting)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.text(alphabet="abcé漢🙂\n", max_size=40),
    st.lists(st.text(alphabet="abcé漢🙂", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), min_size=1, max_size=60),
)
def test_a_stream_shows_the_text_up_to_the_first_stop_however_it_is_cut(text, stops, cuts):
    stream, shown, raw = TextStream(stops), "", text.encode()
    for size in cuts * 200:
        if not raw or stream.stopped:
            break
        shown += stream.push(raw[:size])
        raw = raw[size:]
    if not stream.stopped:
        shown += stream.flush()
    # Of several stops the one that is complete first ends the text, and nothing of it is shown; of
    # those that end together, the longest.
    found = [(text.find(stop), len(stop)) for stop in stops if stop in text]
    _, start = min(((at + length, at) for at, length in found), default=(0, len(text)))
    assert shown == text[:start] and stream.stopped == bool(found)


def test_half_a_character_is_held_back_and_broken_ones_are_replaced():
    stream = TextStream()
    assert stream.push("é".encode()[:1]) == "" and stream.undecoded == b"\xc3"
    assert stream.push("é".encode()[1:]) == "é"
    assert stream.push(b"\xff") == "\ufffd"
    assert stream.push(b"\xc3") == "" and stream.flush() == "\ufffd"


def test_nothing_follows_a_stop():
    stream = TextStream(["A"])
    assert stream.push(b"xA\xe4") == "x" and stream.flush() == ""


def test_a_stream_goes_on_where_another_was_left():
    first = TextStream(["stop"])
    assert first.push(b"go st") == "go "
    second = TextStream(["stop"], held=first.held, undecoded=first.undecoded)
    assert second.push(b"op!") == "" and second.stopped
