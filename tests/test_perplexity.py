"""`keelback perplexity`: figures against definitions, stored figures and llama.cpp's rule.

The model is the embedded one, the text a few hundred random tokens or English words.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from distances import log_softmax
from harness import ctrl_c_at
from keelback import models
from keelback.cli import main
from keelback.convert import convert
from keelback.engine import perplexity
from keelback.engine.curve import curve, sparkline
from keelback.engine.divergence import diverge, summary
from keelback.engine.evaluation import Task, evaluate
from keelback.engine.logits_file import Text, writing
from keelback.engine.model import Model
from keelback.kernels.errors import InvalidInput
from rewriting import tensor

WORDS = "It was the best of times, it was the worst of times, and the judge said so. " * 12
SIZE = 24


def keelback(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "keelback.cli", "perplexity", *arguments]
    options = {"capture_output": True, "text": True, "timeout": 120, "input": WORDS, **options}
    return subprocess.run(command, **options)


def measure(model: Model, **task) -> dict:
    checked = Task(**{"text": WORDS, **task})
    checked.check()
    return evaluate(model, checked, lambda *_: None)


@pytest.fixture(scope="module")
def ids(demo: Model) -> np.ndarray:
    return np.array(demo.tokenizer.encode(WORDS, parse_special=False))


def carried_by_definition(model: Model, ids: np.ndarray) -> np.ndarray:
    logits, _ = model.forward(ids[:-1], logits="all")
    return -log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]


def chunked_by_definition(model: Model, ids: np.ndarray, size: int) -> np.ndarray:
    """Every chunk alone, BOS in place of its first token; what follows its middle is counted."""
    values = []
    for start in range(0, len(ids) - size + 1, size):
        read = [model.tokenizer.bos_id, *ids[start + 1 : start + size]]
        logs = log_softmax(model.forward(read, logits="all")[0])
        middle = size // 2
        values += [-logs[i, ids[start + i + 1]] for i in range(middle, size - 1)]
    return np.array(values)


# ---- likelihoods


@pytest.mark.parametrize("rows", [1, 7, 512])
def test_one_pass_carries_the_state_through_forwards_of_any_size(demo, ids, rows):
    expected = carried_by_definition(demo, ids[:90])
    found = list(perplexity.carried(demo, ids[:90], rows))
    values = np.concatenate([perplexity.likelihoods(f.logits, f.targets) for f in found])
    assert [f.first for f in found] == list(range(1, 90, rows))
    assert np.abs(values - expected).max() < 1e-6


@pytest.mark.parametrize("rows", [5, SIZE, 3 * SIZE + 1, 512])
def test_chunks_follow_llamacpps_rule_however_many_are_read_at_once(demo, ids, rows):
    expected = chunked_by_definition(demo, ids, SIZE)
    found = list(perplexity.chunked(demo, ids, SIZE, rows))
    values = np.concatenate([perplexity.likelihoods(f.logits, f.targets) for f in found])
    assert np.abs(values - expected).max() < 1e-6
    places = np.concatenate([f.first + np.arange(len(f.targets)) for f in found])
    assert (places % SIZE > SIZE // 2).all() and (np.diff(places) > 0).all()


def test_a_large_vocabulary_makes_forwards_smaller():
    assert perplexity.rows_at_once(2048) == 512 and perplexity.rows_at_once(2048, 100) == 100
    assert perplexity.rows_at_once(248_320) * 248_320 * 4 <= 64 << 20
    assert perplexity.rows_at_once(1 << 26) == 1


def test_likelihoods_survive_extreme_logits():
    rows = np.array([[3e4, 0, -3e4], [0, 0, 0]], np.float32)
    assert perplexity.likelihoods(rows, np.array([2, 1])).tolist() == [6e4, np.log(3)]


# ---- estimates


def test_the_estimate_is_the_one_of_llamacpp():
    values = np.random.default_rng(0).gamma(2, 2, 500)
    found = perplexity.estimate(values)
    error = np.sqrt((np.mean(values**2) - values.mean() ** 2) / 499)
    assert found.mean == pytest.approx(values.mean()) and found.error == pytest.approx(error)
    assert found.ppl == pytest.approx(np.exp(values.mean()))
    assert found.ppl_error == pytest.approx(found.ppl * error)
    assert perplexity.estimate(values[:1]).error == 0


def test_what_exceeds_a_float_is_infinite_and_null_in_json(demo: Model, tmp_path: Path):
    loud, text, base = str(tmp_path / "loud.gguf"), tmp_path / "text", str(tmp_path / "base")
    norm = tensor(Path(models.DEMO), "output_norm.weight")
    raw = Path(models.DEMO).read_bytes().replace(norm.tobytes(), (1000 * norm).tobytes())
    Path(loud).write_bytes(raw)
    text.write_text(WORDS)

    def run(command: str, *options: str) -> str:
        done = CliRunner().invoke(main, [command, "-m", loud, "-f", str(text), *options])
        assert done.exit_code == 0, done.output
        return done.stdout

    def strict(told: str) -> dict:
        return json.loads(told, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    assert "PPL = inf" in run("perplexity", "-c", "32")
    found = strict(run("perplexity", "-c", "32", "--json"))
    assert found["ppl"] is None and None in found["chunks"] and found["nll"] > 709
    measure(demo, tokens=60, base=base)
    found = strict(run("perplexity", "--kl-divergence", "--kl-divergence-base", base, "--json"))
    assert found["divergence"]["ppl_ratio"] is None and found["divergence"]["base_ppl"] > 1
    few = ("-n", "200", "--state-type", "bf16")
    assert " inf " in run("drift", *few)
    assert strict(run("drift", *few, "--json"))["types"][1]["perplexity"] is None


def test_a_comparison_takes_what_is_common_out_and_counts_blocks():
    draw = np.random.default_rng(1)
    text = draw.gamma(2, 2, 4096)
    # Neighbours share what the one has over the other, so that tokens are not independent.
    shared = np.repeat(draw.normal(0.01, 0.02, 64), 64)
    found = perplexity.compare(text + shared, text)
    assert found.mean == pytest.approx(shared.mean()) and found.blocks == 16
    blocks = shared.reshape(16, 256).mean(axis=1)
    assert found.error == pytest.approx(blocks.std(ddof=1) / 4)
    assert found.error > 1.5 * perplexity.estimate(shared).error
    assert perplexity.compare(text[:3], text[:3]).blocks == 3
    with pytest.raises(InvalidInput, match="same tokens"):
        perplexity.compare(text, text[1:])


# ---- divergence


def test_divergence_is_its_definition():
    draw = np.random.default_rng(4)
    base = draw.normal(0, 2, (200, 50)).astype(np.float32)
    logits = base + draw.normal(0, 0.1, base.shape).astype(np.float32)
    targets = draw.integers(0, 50, 200)
    expected = log_softmax(base)
    found = diverge(logits, expected.astype(np.float32), targets)
    ours, at = log_softmax(logits), (np.arange(200), targets)
    kl = (np.exp(expected) * (expected - ours)).sum(axis=1)
    facts = summary(found)
    assert facts["kl"]["mean"] == pytest.approx(kl.mean(), rel=1e-4)
    assert facts["kl"]["median"] == pytest.approx(np.median(kl), rel=1e-3)
    assert facts["kl"]["p99"] == pytest.approx(np.percentile(kl, 99), rel=1e-3)
    assert facts["kl"]["maximum"] == pytest.approx(kl.max(), rel=1e-3)
    same = (logits.argmax(axis=1) == base.argmax(axis=1)).mean()
    assert facts["same_top"]["share"] == pytest.approx(same) and 0.5 < same < 1
    moved = np.exp(ours[at]) - np.exp(expected[at])
    assert facts["delta_p"]["mean"] == pytest.approx(moved.mean(), abs=1e-6)
    assert facts["delta_p"]["rms"] == pytest.approx(np.sqrt((moved**2).mean()), rel=1e-4)
    ratio = np.exp((expected[at] - ours[at]).mean())
    assert facts["ppl_ratio"] == pytest.approx(ratio, rel=1e-6)
    assert facts["correlation"] > 0.99


@pytest.mark.parametrize("task", [{"tokens": 60}, {"chunk": 16, "chunks": 5}])
def test_a_model_does_not_diverge_from_itself(demo: Model, tmp_path: Path, task: dict):
    base = str(tmp_path / "base")
    alone = measure(demo, **task, base=base)
    again = measure(demo, text="", base=base, compare=True)
    assert again["ppl"] == alone["ppl"] and again["mode"] == alone["mode"]
    apart = again["divergence"]
    assert abs(apart["kl"]["mean"]) < 1e-4 and apart["same_top"]["share"] == 1
    if "tokens" in task:
        assert abs(apart["paired"]["mean"]) < 1e-6
    shorter = {"tokens": 20} if "tokens" in task else {"chunks": 2}
    half = measure(demo, text="", base=base, compare=True, **shorter)
    assert half["scored"] == (19 if "tokens" in task else 14)


def test_a_base_of_another_model_is_refused(demo: Model, tmp_path: Path):
    base = tmp_path / "base"
    with writing(base, Text(np.arange(8) % 5, 5, 8)) as writer:
        writer.add(np.zeros((3, 5), np.float32))
    with pytest.raises(InvalidInput, match="compare models of one vocabulary"):
        measure(demo, base=str(base), compare=True)
    with writing(base, Text(np.arange(8), 2048, 8)) as writer:
        writer.add(np.zeros((3, 2048), np.float32))
    for task in ({"chunk": 16}, {"tokens": 5}):
        with pytest.raises(InvalidInput, match="leave -c and --tokens out"):
            measure(demo, base=str(base), compare=True, **task)
    with writing(base, Text(np.arange(3), 2048, None)) as writer:
        writer.add(np.zeros((2, 2048), np.float32))
    with pytest.raises(InvalidInput, match="leave -c and --chunks out"):
        measure(demo, base=str(base), compare=True, chunks=1)


def test_a_text_of_one_token_is_refused(demo: Model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo.tokenizer, "encode", lambda *_, **__: [5])
    with pytest.raises(InvalidInput, match="the text has 1 tokens, too few"):
        measure(demo, text="a")


# ---- what is made of it


def test_a_curve_holds_every_token_once():
    positions = np.concatenate([np.arange(1, 1000), np.arange(1, 1000)])
    values = np.log(positions)
    for even in (False, True):
        buckets = curve(positions, values, even)
        assert buckets[0].first == 1 and buckets[-1].last == 999
        assert all(a.last + 1 == b.first for a, b in pairwise(buckets))
        assert sum(bucket.estimate.count for bucket in buckets) == len(values)
        drawn = sparkline([bucket.estimate.mean for bucket in buckets])
        assert drawn[0] == "▁" and drawn[-1] == "█" and len(drawn) == len(buckets)


def test_a_sparkline_rises_from_its_least_value_or_from_zero():
    assert sparkline([3.0, 3.0]) == "▁▁" and sparkline([1, 2, 8]) == "▁▂█"
    assert sparkline([4, 4], 0) == "██" and sparkline([0, 0], 0) == "▁▁"


def test_figures_and_picture_of_one_pass(demo: Model, ids: np.ndarray, tmp_path: Path):
    picture = tmp_path / "curve.svg"
    found = measure(demo, plot=str(picture), base=str(tmp_path / "base"))
    values = carried_by_definition(demo, ids)
    assert found["ppl"] == pytest.approx(np.exp(values.mean()), rel=1e-6)
    assert found["scored"] == len(ids) - 1 and found["chunks"] == []
    assert sum(point["count"] for point in found["curve"]) == found["scored"]
    measure(demo, text="", base=str(tmp_path / "base"), compare=True, plot=str(picture))
    lines = ElementTree.parse(picture).getroot().findall("{*}polyline")
    assert len(lines) == 2 and lines[0].get("points") == lines[1].get("points")


def test_a_text_for_chunks_ends_where_llamacpps_does(demo: Model):
    """Its last line break is no token, and what makes no whole chunk is left out."""
    found = [measure(demo, text=text, chunk=16) for text in (WORDS, WORDS + "\n")]
    assert found[0] == found[1] and found[0]["tokens"] % 16 == 0
    assert len(found[0]["chunks"]) == found[0]["tokens"] // 16
    assert found[0]["chunks"][-1] == pytest.approx(found[0]["ppl"])
    assert measure(demo, text=WORDS * 8, chunks=1)["ctx_size"] == 512


@pytest.mark.parametrize("name", ["gdn-tiny", "mamba-tiny-lit", "mamba2-tiny"])
def test_perplexity_is_the_stored_one(shared: Path, tmp_path: Path, name: str):
    folder = shared / "checkpoints" / name
    stored = json.loads((folder / "reference.json").read_text("utf-8"))["perplexity_first_4096"]
    wanted = stored.get("with_bos") or stored["no_bos"]
    model = Model(convert(folder, tmp_path / "model.gguf", "f32"), notice=lambda text: None)
    text = (shared / "corpus" / "valid.txt").read_text("ascii")
    found = measure(model, text=text, tokens=wanted["tokens_fed"])
    assert found["scored"] == wanted["tokens_scored"]
    assert found["ppl"] == pytest.approx(wanted["ppl"], rel=1e-4)


@pytest.mark.parametrize("name", ["mamba-tiny-lit", "mamba2-tiny"])
def test_llama_perplexity_finds_the_same_and_reads_our_base(
    shared: Path, tmp_path: Path, name: str
):
    tools = os.environ.get("KEELBACK_LLAMACPP_TOOLS")
    if not tools:
        pytest.skip("KEELBACK_LLAMACPP_TOOLS names no folder with llama-perplexity")
    path = convert(shared / "checkpoints" / name, tmp_path / "model.gguf", "f32")
    text = shared / "corpus" / "valid.txt"

    def theirs(*options: str) -> str:
        command = [f"{tools}/llama-perplexity", "-m", str(path), "-f", str(text), "-c", "128"]
        return subprocess.run(
            [*command, "--chunks", "6", "-t", "2", *options], capture_output=True, text=True,
            env=os.environ | {"LD_LIBRARY_PATH": tools}, timeout=120, check=True,
        ).stdout  # fmt: skip

    ours, bases = keelback(str(path), "-f", str(text), "-c", "128", "--chunks", "6"), {}
    running = ours.stdout.splitlines()[0]
    assert running.startswith("[1]") and "[6]" in running and running in theirs()
    model = Model(path, notice=lambda text: None)
    task = {"text": text.read_text("ascii"), "chunk": 128, "chunks": 6}
    for who in ("ours", "theirs"):
        bases[who] = str(tmp_path / who)
    measure(model, **task, base=bases["ours"])
    theirs("--kl-divergence-base", bases["theirs"])
    apart = measure(model, base=bases["theirs"], compare=True)["divergence"]
    assert abs(apart["kl"]["mean"]) < 1e-5 and apart["same_top"]["share"] == 1
    said = theirs("--kl-divergence", "--kl-divergence-base", bases["ours"])
    assert re.search(r"Mean    KLD: +-?0\.0000", said), said[-2000:]


# ---- the command


def test_the_command_prints_figures_and_json(tmp_path: Path):
    done = keelback("demo", "-c", "32")
    first, second, third, _ = done.stdout.splitlines()
    assert done.returncode == 0 and first.startswith("[1]") and "halves of chunks of 32" in second
    assert third.startswith("PPL = ") and " +/- " in third
    base = str(tmp_path / "base")
    found = json.loads(keelback("--tokens", "50", "--json", "--kl-divergence-base", base).stdout)
    assert found["scored"] == 49 and found["mode"] == "carried" and not found["interrupted"]
    compared = keelback("--kl-divergence", "--kl-divergence-base", base)
    assert compared.returncode == 0 and "KL divergence " in compared.stdout


BAD = {
    "no text": ((), "there is no text to measure"),
    "no such text": (("-f", "nowhere.txt"), "nowhere.txt cannot be read"),
    "no such model": (("nowhere.gguf", "-f", __file__), "nowhere.gguf"),
    "a chunk of two": (("-f", __file__, "-c", "2"), "give -c 3 or more"),
    "no chunks": (("-f", __file__, "--chunks", "0"), "--chunks 0"),
    "a base in no folder": (("-f", __file__, "--kl-divergence-base", "no/x"), "no is no folder"),
    "no tokens": (("-f", __file__, "--tokens", "-3"), "--tokens -3"),
    "one token": (("-f", __file__, "--tokens", "1"), "give 2 or more"),
    "chunks that are longer": (("-f", __file__, "-c", "1000000"), "too short"),
    "two ways": (("-f", __file__, "--tokens", "9", "-c", "8"), "--tokens is for one pass"),
    "another picture": (("-f", __file__, "--plot", "x.png"), "drawn as SVG"),
    "no base": (("--kl-divergence",), "needs the file"),
    "no such base": (("--kl-divergence", "--kl-divergence-base", "x"), "x cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    monkeypatch.chdir(tmp_path)
    arguments, said = BAD[case]
    done = CliRunner().invoke(main, ["perplexity", *arguments])
    assert done.exit_code == 1 and not done.stdout and not list(tmp_path.iterdir())
    assert said in done.stderr and done.stderr.count("Error: ") == 1


def test_states_are_kept_as_they_are_asked_for(tmp_path: Path):
    (tmp_path / "text").write_text(WORDS)
    few = ["-f", str(tmp_path / "text"), "--tokens", "99", "--json"]
    runs = [
        CliRunner().invoke(main, ["perplexity", *few, "--state-type", kind])
        for kind in ("f32", "int8")
    ]
    exact, rounded = (json.loads(done.stdout)["nll"] for done in runs)
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.01)


def test_ctrl_c_leaves_figures_and_no_file(tmp_path: Path, monkeypatch):
    """It comes in the middle of a forward."""
    calls = ctrl_c_at(monkeypatch, Model, "forward", 3)
    monkeypatch.chdir(tmp_path)
    Path("text").write_text(WORDS)
    base = ["--kl-divergence-base", "base"]
    done = CliRunner().invoke(main, ["perplexity", "-b", "8", "-f", "text", *base])
    assert done.exit_code == 130 and "16 tokens in one pass" in done.stdout
    assert ", interrupted" in done.stdout and "PPL = " in done.stdout
    assert "base is not written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    calls[:] = [1, 1]
    done = CliRunner().invoke(main, ["perplexity", "-f", "text"])
    assert done.exit_code == 130 and not done.stdout
