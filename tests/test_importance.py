"""`keelback imatrix`: sums of squares against inputs that the definitions saw, and llama.cpp's.

KEELBACK_LLAMACPP_TOOLS names the folder with llama-imatrix; without, that test is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import tiny
from harness import ctrl_c_at
from keelback.cli import main
from keelback.convert import convert
from keelback.engine.importance import collect, statistics, watch
from keelback.engine.model import Model
from keelback.engine.perplexity import chunks_of
from keelback.engine.reference import NumpyBackend
from keelback.engine.state import State
from keelback.kernels.errors import InvalidInput
from keelback.kernels.formats import imatrix
from keelback.kernels.formats.imatrix import Importance

#: All kinds of matrices: dense ones, experts with one input and with one each, one for every head.
NAMES = ("mamba2-q8", "gdn-q8", "granite-moe", "qwen35moe-fused", "kimi-hub", "nemotron-latent")
SIZE, CHUNKS = 20, 3
#: Where activations are rounded on the way, a last bit can become a step of one.
TOLERANCE = {"f32": 2e-6, "q8_0": 2e-3}
WORDS = "It was the best of times, it was the worst of times, and the judge said so. " * 9


def watched(path: Path | str, head: bool = False) -> tuple[Model, dict]:
    found: dict[str, Any] = {}
    model = Model(
        path, 2, notice=lambda text: None, cache_type_k="f32", cache_type_v="f32",
        amend=lambda graph: found.update(watch(graph, head)),
    )  # fmt: skip
    return model, found


def collected(path: Path | str, chunks: np.ndarray, head: bool = False, batch=512) -> Importance:
    model, found = watched(path, head)
    return collect(model, found, chunks, lambda *_: None, head, batch)[0]


def chunks_for(name: str) -> np.ndarray:
    return tiny.ids(name, SIZE * CHUNKS).reshape(CHUNKS, SIZE)


def seen_by_definition(path: Path, chunks: np.ndarray, monkeypatch) -> Importance:
    """Every input of a matrix as the definitions see it before it is rounded, summed in float64."""
    kept = {"cache_type_k": "f32", "cache_type_v": "f32"}
    model = Model(path, backend="numpy", notice=lambda text: None, **kept)
    values: dict[Any, np.ndarray] = {}
    play = NumpyBackend._play

    def recording(self, node, batch, known):
        values[node.out.buffer] = out = play(self, node, batch, known)
        return out

    monkeypatch.setattr(NumpyBackend, "_play", recording)
    found = Importance()
    for ids in chunks:
        values.clear()
        model.forward(ids, logits="all")
        for node in model.graph.nodes:
            if node.op.name in ("linear", "expert_linear"):
                _add(found, node, values)
    return found


def _add(found: Importance, node: Any, values: dict[Any, np.ndarray]) -> None:
    def of(slot: str) -> np.ndarray | None:
        value = node.operands.get(slot)
        return value and values[value.buffer][:, value.start : value.start + value.width]

    name, more, x, routes = node.operands["weight"].name, node.attributes, of("x"), of("routes")
    used, parts, matrices = (more.get(key, 1) for key in ("used", "parts", "experts"))
    inputs = x.reshape(len(x), parts, -1).astype(np.float64)
    sums = found.sums.setdefault(name, np.zeros((matrices, inputs.shape[2])))
    counts = found.counts.setdefault(name, np.zeros(matrices))
    for row in range(len(x)):
        chosen = range(used) if routes is None else routes[row, :used].astype(int)
        for rank, matrix in enumerate(chosen):
            sums[matrix] += inputs[row, rank % parts] ** 2
            counts[matrix] += 1


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
@pytest.mark.parametrize("name", NAMES)
def test_sums_are_those_of_the_inputs(tiny_file, monkeypatch, name: str, outtype: str):
    path, chunks = tiny_file(name, outtype), chunks_for(name)
    found = collected(path, chunks, head=True)
    expected = seen_by_definition(path, chunks, monkeypatch)
    assert found.sums.keys() == expected.sums.keys()
    for key, sums in expected.sums.items():
        assert np.array_equal(found.counts[key], expected.counts[key]), key
        assert np.abs(found.sums[key] - sums).max() < TOLERANCE[outtype] * sums.max(), key
        assert found.counts[key].sum() % (SIZE * CHUNKS) == 0
    assert (found.chunks, found.chunk_size) == (CHUNKS, SIZE)
    layers = collected(path, chunks)
    assert {*layers.sums} == {key for key in found.sums if key.startswith("blk.")}
    assert {*found.sums} - {*layers.sums} <= {"output.weight", "token_embd.weight"}


@pytest.mark.parametrize("name", ["gdn-q8", "granite-moe"])
def test_sums_do_not_depend_on_how_the_chunks_are_read(tiny_file, name: str):
    path, chunks = tiny_file(name, "f32"), chunks_for(name)
    whole = collected(path, chunks)
    for batch in (1, 7, SIZE, 2 * SIZE + 3):
        found = collected(path, chunks, batch=batch)
        for key, sums in whole.sums.items():
            assert np.array_equal(found.sums[key], sums), (key, batch)
    # Each from an empty state: a chunk counts the same wherever it stands.
    turned = collected(path, chunks[::-1].copy())
    assert all(np.allclose(turned.sums[key], sums, rtol=1e-6) for key, sums in whole.sums.items())


def test_watching_changes_no_logit(tiny_file, tiny_model):
    ids = tiny.ids("qwen35moe-fused", 30)
    plain, _ = tiny_model("qwen35moe-fused", "f32").forward(ids, logits="all")
    model, _ = watched(tiny_file("qwen35moe-fused", "f32"), head=True)
    assert np.array_equal(model.forward(ids, logits="all")[0], plain)


def test_ctrl_c_keeps_the_chunks_that_were_read(tiny_file, monkeypatch):
    model, found = watched(tiny_file("mamba2-q8", "f32"))
    calls = ctrl_c_at(monkeypatch, Model, "forward_batch", 3)
    chunks = chunks_for("mamba2-q8")
    told: list[tuple] = []
    kept, interrupted = collect(model, found, chunks, lambda *step: told.append(step), batch=SIZE)
    assert interrupted and kept.chunks == 2
    assert all(count == 2 * SIZE for counts in kept.counts.values() for count in counts)
    assert told == [("collecting", done, CHUNKS) for done in range(3)]
    calls[:] = [1, 1]
    with pytest.raises(KeyboardInterrupt):
        collect(model, found, chunks, lambda *_: None)


def test_ctrl_c_adds_all_of_a_chunk_or_none(tiny_file, monkeypatch):
    """It comes between two tensors of the second chunk."""
    model, found = watched(tiny_file("mamba2-q8", "f32"))
    tensors = len({ref for refs in found.values() for ref in refs})
    calls = ctrl_c_at(monkeypatch, State, "view", tensors + 2)
    chunks = chunks_for("mamba2-q8")
    kept, interrupted = collect(model, found, chunks, lambda *_: None, batch=SIZE)
    assert interrupted and kept.chunks == 1 and len(calls) == tensors + 2
    assert all(count == SIZE for counts in kept.counts.values() for count in counts)


def test_texts_are_cut_as_llamacpp_cuts_them(demo: Model):
    ids = demo.tokenizer.encode(WORDS, parse_special=False)
    cut = chunks_of(demo, WORDS + "\n", 16, None, False)
    assert cut.tolist() == np.array(ids[: len(ids) // 16 * 16]).reshape(-1, 16).tolist()
    assert len(chunks_of(demo, WORDS, 16, 2, False)) == 2
    assert chunks_of(demo, "</s>" * 9, 4, 1, True)[0, 1:].tolist() == [2, 2, 2]
    assert 2 not in chunks_of(demo, "</s>" * 9, 4, None, False)
    with pytest.raises(InvalidInput, match="too short"):
        chunks_of(demo, "a", 512, 1, False)


def test_the_command_writes_a_file_and_shows_it(tmp_path: Path):
    text, target = tmp_path / "text", tmp_path / "new.gguf"
    text.write_text(WORDS)
    options = ["-f", str(text), "-c", "32", "--chunks", "3", "-o", str(target)]
    done = CliRunner().invoke(main, ["imatrix", "demo", *options])
    assert done.exit_code == 0 and done.stdout.endswith("3 chunks of 32\n"), done.output
    found = imatrix.read(target)
    assert (found.chunks, found.chunk_size, found.datasets) == (3, 32, [str(text)])
    assert len(found.sums) == 40 and found.counts["blk.0.ffn_up.weight"].tolist() == [96]
    # What reads the same rows has the same sums, and is an entry of its own.
    for name in ("attn_gate", "ssm_alpha", "ssm_beta"):
        same = found.sums["blk.0.attn_qkv.weight"]
        assert np.array_equal(found.sums[f"blk.0.{name}.weight"], same)
    shown = CliRunner().invoke(main, ["imatrix", "--show-statistics", str(target)])
    assert shown.exit_code == 0 and len(shown.stdout.splitlines()) == 41
    as_json = CliRunner().invoke(main, ["imatrix", "--show-statistics", str(target), "--json"])
    rows = json.loads(as_json.stdout)
    assert rows == statistics(target) and {row["inputs"] for row in rows} == {96}


def test_statistics_say_what_a_quantizer_would_like_to_know(tmp_path: Path):
    sums = np.array([[4, 4, 4, 4], [8, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    found = Importance({"e": sums, "one": sums[1:2]}, {"e": np.float32([2, 4, 0]), "one": sums[0]})
    found.counts["one"] = np.float32([8])
    imatrix.write(tmp_path / "x", found)
    experts, one = statistics(tmp_path / "x")
    assert experts["unseen"] == 1 and experts["inputs"] == 6 and experts["mean"] == 10 / 8
    assert experts["largest"] == 2 and 0 < experts["evenness"] < 1
    assert one["evenness"] == 0 and one["largest"] == 1


def run_imatrix(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["imatrix", *map(str, arguments)])


def test_importance_of_several_texts_adds_up(tmp_path: Path):
    (tmp_path / "a").write_text(WORDS)
    (tmp_path / "b").write_text(WORDS[::-1])
    for name in "ab":
        size = ("-c", "32", "--chunks", "3")
        done = run_imatrix("-f", tmp_path / name, "-o", tmp_path / f"{name}.gguf", *size)
        assert done.exit_code == 0, done.stderr
    a, b = (imatrix.read(tmp_path / f"{name}.gguf") for name in "ab")
    added = ("--in-file", tmp_path / "a.gguf")
    wanted = tmp_path / "ab.gguf"
    for more in (("--in-file", tmp_path / "b.gguf"), ("-f", tmp_path / "b", "-c", "16")):
        few = ("--chunks", "6") if "-c" in more else ()
        done = run_imatrix(*added, *more, *few, "-o", wanted)
        assert done.exit_code == 0, done.stderr
        both = imatrix.read(wanted)
        assert sorted(both.datasets) == [str(tmp_path / name) for name in "ab"]
        assert both.chunks * both.chunk_size == 6 * 32
        for name, sums in a.sums.items():
            assert np.array_equal(both.counts[name], a.counts[name] + b.counts[name])
            if not few:  # chunks of another length begin elsewhere
                assert np.array_equal(both.sums[name], sums + b.sums[name])


def test_importance_of_another_model_is_refused_before_anything_is_read(tmp_path: Path):
    for name, width in (("a", 4), ("b", 8)):
        found = Importance({"w": np.ones((1, width), np.float32)}, {"w": np.float32([1])})
        imatrix.write(tmp_path / name, found)
    both = ("--in-file", tmp_path / "a", "--in-file", tmp_path / "b", "-o", tmp_path / "c")
    done = run_imatrix(*both, "-f", __file__)
    assert done.exit_code == 1 and not (tmp_path / "c").exists()
    assert "b knows w as 1 x 8 and not 1 x 4 columns" in done.stderr


def test_no_file_is_written_over_one_that_is_read(tmp_path: Path):
    text = tmp_path / "text.svg"
    text.write_text(WORDS)
    read = ["-f", str(text), "-c", "32"]
    for command in (
        ["imatrix", "-o"],
        ["perplexity", "--kl-divergence-base"],
        ["perplexity", "--plot"],
    ):
        done = CliRunner().invoke(main, [*command, str(text), *read])
        assert done.exit_code == 1 and "text.svg is read here" in done.stderr
    assert text.read_text() == WORDS


BAD = {
    "a short text": (("-f", __file__, "-c", "1000000"), "too short"),
    "no target": (("-f", __file__, "-o", "nowhere/x"), "nowhere is no folder"),
    "no such file": (("--show-statistics", "nowhere"), "nowhere"),
    "another file": (("--show-statistics", __file__), "is not a GGUF file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    monkeypatch.chdir(tmp_path)
    arguments, said = BAD[case]
    done = CliRunner().invoke(main, ["imatrix", *arguments])
    assert done.exit_code == 1 and not done.stdout and not list(tmp_path.iterdir())
    assert said in done.stderr and done.stderr.count("Error: ") == 1


def test_what_cannot_be_meant_is_refused_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(Model, "__init__", lambda *_, **__: pytest.fail("a model is loaded"))
    for options, said in (
        (("-f", __file__, "-c", "0"), "'-c' / '--ctx-size': 0 is not"),
        (("-f", __file__, "--chunks", "0"), "'--chunks': 0 is not"),
        ((), "there is no text"),
        (("-f", __file__, "--json"), "give --show-statistics"),
    ):
        done = run_imatrix(*options)
        assert done.exit_code in (1, 2) and said in done.stderr


@pytest.mark.parametrize("name", ["mamba-tiny-lit", "mamba2-tiny"])
def test_llama_imatrix_finds_the_same(shared: Path, tmp_path: Path, name: str):
    tools = os.environ.get("KEELBACK_LLAMACPP_TOOLS")
    if not tools:
        pytest.skip("KEELBACK_LLAMACPP_TOOLS names no folder with llama-imatrix")
    model = convert(shared / "checkpoints" / name, tmp_path / "model.gguf", "f32")
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    options = ["-m", str(model), "-f", str(shared / "corpus" / "valid.txt"), "-c", "128"]
    options += ["--chunks", "5"]
    assert CliRunner().invoke(main, ["imatrix", *options, "-o", str(ours)]).exit_code == 0
    environment = os.environ | {"LD_LIBRARY_PATH": tools}
    command = [f"{tools}/llama-imatrix", *options, "-t", "2", "-o", str(theirs)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    found, expected = imatrix.read(ours), imatrix.read(theirs)
    assert found.sums.keys() == expected.sums.keys()
    assert (found.chunks, found.chunk_size) == (expected.chunks, expected.chunk_size) == (5, 128)
    for key, sums in expected.sums.items():
        assert np.array_equal(found.counts[key], expected.counts[key])
        assert np.abs(found.sums[key] / sums - 1).max() < 1e-3
