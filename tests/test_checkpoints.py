"""The trained checkpoints against the logits, tokens and perplexities that came with them.

They are found through KEELBACK_SHARED (a folder with `checkpoints` and `corpus`).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import keelback
from keelback.convert import convert

NAMES = ("gdn-tiny", "mamba-tiny-lit", "mamba2-tiny")
BACKENDS = ("numpy", "cpu")
LOGIT_TOLERANCE = 1e-3
PERPLEXITY_TOLERANCE = {"f32": 1e-3, "q8_0": 1e-2}


@pytest.fixture(scope="module")
def converted(
    shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("converted")
    return {
        (name, outtype): convert(
            shared / "checkpoints" / name, folder / f"{name}-{outtype}.gguf", outtype
        )
        for name in NAMES
        for outtype in ("f32", "q8_0")
    }


def reference(shared: Path, name: str) -> dict:
    return json.loads((shared / "checkpoints" / name / "reference.json").read_text("utf-8"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_f32_gives_the_stored_logits_in_the_stored_order(shared, converted, name, backend):
    model = keelback.load(converted[name, "f32"], backend=backend)
    for prompt in reference(shared, name)["prompts"]:
        assert model.tokenizer.encode(prompt["text"]) == prompt["ids"]
        logits, state = model.forward(prompt["ids"], logits="all")
        top = prompt["top5"]
        stored = np.array([entry["logit"] for entry in top])
        ours = logits[-1][[entry["id"] for entry in top]]
        assert np.abs(ours - stored).max() < LOGIT_TOLERANCE
        apart = -np.diff(stored) > LOGIT_TOLERANCE
        assert (-np.diff(ours) > 0)[apart].all()
        assert abs(logits[-1].mean() - prompt["logits_mean"]) < LOGIT_TOLERANCE
        assert logits.argmax(axis=1).tolist() == prompt["argmax_per_position"]
        assert greedy(model, state, len(prompt["greedy_next_32"])) == prompt["greedy_next_32"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_the_stored_one(shared, converted, name, outtype, backend, record_property):
    model = keelback.load(converted[name, outtype], backend=backend)
    measured = reference(shared, name)["perplexity_first_4096"]
    expected = measured.get("with_bos") or measured["no_bos"]
    text = (shared / "corpus" / "valid.txt").read_text("ascii")
    ids = model.tokenizer.encode(text)[: expected["tokens_fed"]]
    ours = perplexity(model, ids)
    record_property("perplexity", ours)
    print(f"{name} {outtype} {backend}: {ours:.4f} (stored {expected['ppl']:.4f})")
    assert abs(ours / expected["ppl"] - 1) < PERPLEXITY_TOLERANCE[outtype]


def greedy(model: keelback.Model, state: keelback.State, count: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.append(int(state.logits.argmax()))
        model.forward(tokens[-1:], state)
    return tokens


def perplexity(model: keelback.Model, ids: list[int]) -> float:
    """exp of the mean negative log-likelihood of ids[1:], the state carried through."""
    logits, _ = model.forward(ids[:-1], logits="all")
    logits = logits.astype(np.float64)
    largest = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(axis=1)) + largest[:, 0]
    return float(np.exp(np.mean(total - logits[np.arange(len(ids) - 1), ids[1:]])))
