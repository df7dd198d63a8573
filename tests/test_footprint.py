"""What `keelback plan` promises and `--max-ram` refuses; nothing here measures the machine."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

import keelback
from keelback.cli import main
from keelback.engine import footprint
from keelback.engine.model import Model
from keelback.kernels.errors import InvalidInput

G = 1 << 30


def planned(*arguments: str) -> dict:
    done = CliRunner().invoke(main, ["plan", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_plan_counts_what_a_model_then_reserves(tiny_file):
    path = str(tiny_file("mamba2-q8", "q8_0"))
    facts, model = planned(path, "-t", "2"), Model(path, 2, repack=True)
    store = facts["bytes"]
    program, layout = model.backend._program, model.layout
    assert store["arena"] == model.backend._arena.nbytes
    # Tensors that get into panels are read from the file until then.
    moved = sum(model.file.tensors[name].nbytes for name in program.moves)
    assert store["panels"] + store["mapped"] + store["vectors"] + store["converted"] == (
        sum(data.nbytes for data in program.weights) - moved
    )
    assert store["state"] == store["copies"] == layout.size
    assert store["logits"] == 3 * 4 * model.vocabulary
    assert facts["total_bytes"] == sum(store.values())
    assert facts["held_bytes"] == facts["total_bytes"] - store["mapped"] - store["twice"]
    # Loading the kernels takes more than so small a model.
    assert facts["peak_bytes"] == footprint.LOADING > facts["total_bytes"]
    assert facts["available_bytes"] is None or facts["available_bytes"] > 0


def test_a_plan_without_panels_leaves_weights_in_the_file(tiny_file):
    path = str(tiny_file("mamba2-q8", "q8_0"))
    packed, mapped = planned(path, "-t", "2"), planned(path, "-t", "2", "--no-repack")
    assert packed["repack"] and not mapped["repack"]
    assert packed["bytes"]["panels"] and not mapped["bytes"]["panels"]
    assert packed["bytes"]["twice"] and not mapped["bytes"]["twice"]
    assert mapped["bytes"]["mapped"] > packed["bytes"]["mapped"]
    assert (
        mapped["bytes"]["scratch"]
        == 2 * planned(path, "-t", "1", "--no-repack")["bytes"]["scratch"]
    )


def test_a_plan_scales_with_sequences_and_tokens(tiny_file):
    path = str(tiny_file("granite-q8", "q8_0"))
    one = planned(path, "-c", "640")["bytes"]
    for changed, factor in ((("-c", "640", "-np", "3"), 3), (("-c", "1280"), 2)):
        assert planned(path, *changed)["bytes"]["cache"] == factor * one["cache"] > 0
    assert planned(path, "-np", "3")["bytes"]["state"] == 3 * one["state"]


def test_a_plan_is_a_table_too_and_reads_no_tensor(tiny_file, monkeypatch):
    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("keelback.engine.weights.WeightStore.fill", read)
    monkeypatch.setattr("keelback.kernels.formats.blocks.dequantize", read)
    done = CliRunner().invoke(main, ["plan", str(tiny_file("mamba-q8", "q8_0"))])
    assert done.exit_code == 0 and "weights, rearranged" in done.output and "sum" in done.output


def test_plans_of_too_many_sequences_are_refused():
    done = CliRunner().invoke(main, ["plan", "demo", "-np", "9999"])
    assert done.exit_code == 1 and done.output.startswith("Error: ")


def test_weights_in_the_map_and_in_panels_give_the_same_bits_under_one_name(tiny_file):
    path = tiny_file("mamba-q8", "q8_0")
    packed, mapped = (keelback.load(path, 2, repack=repack) for repack in (True, False))
    assert packed.backend.numerics == mapped.backend.numerics
    (first, a), (second, b) = (model.forward(range(70)) for model in (packed, mapped))
    assert np.array_equal(first.view(np.uint32), second.view(np.uint32))
    assert np.array_equal(a.block.view(np.uint32), b.block.view(np.uint32))
    mapped.forward([3], a)


def test_panels_that_would_fill_the_memory_are_not_made(tiny_file, monkeypatch):
    path, told = tiny_file("mamba-q8", "q8_0"), []
    monkeypatch.setattr(footprint, "available_memory", lambda: 1 << 17)
    assert not footprint.fits_panels(Model(path, backend="numpy", notice=told.append).graph)
    monkeypatch.setattr("keelback.engine.model.admission", lambda *_: lambda *_: None)
    Model(path, 1, notice=told.append)
    assert sum("stay in the file" in text for text in told) == 1


def test_what_exceeds_the_limit_is_refused_with_a_remedy(tiny_file, monkeypatch):
    path = tiny_file("mamba-q8", "q8_0")
    with pytest.raises(InvalidInput, match=r"--max-ram allows 1\.00 MiB.*smaller file"):
        keelback.load(path, 1, max_ram="1M")
    held = planned(str(path), "-t", "1")["held_bytes"]
    with pytest.raises(InvalidInput, match="--no-repack"):
        keelback.load(path, 1, max_ram=held - 1)
    keelback.load(path, 1, max_ram=held - 1, repack=False)
    keelback.load(path, 1, max_ram=held)
    monkeypatch.setattr(footprint, "available_memory", lambda: 1 << 20)
    with pytest.raises(InvalidInput, match="of memory are available"):
        keelback.load(path, 1)
    with pytest.raises(InvalidInput, match="cpu backend"):
        keelback.load(path, backend="numpy", max_ram="1G")


def test_the_context_that_is_asked_for_counts(tiny_file):
    path = tiny_file("granite-q8", "q8_0")
    few, many = (planned(str(path), "-t", "1", "-c", c)["held_bytes"] for c in ("64", "1000000"))
    for limit, context in ((few, 64), (many, 1_000_000)):
        Model(path, 1, max_ram=limit, context=context, notice=lambda text: None)
        with pytest.raises(InvalidInput, match=r"--max-ram allows .*: keep fewer tokens \(-c\)"):
            Model(path, 1, max_ram=limit, context=2_000_000)


@pytest.mark.parametrize("command", ["run", "bench"])
def test_run_and_bench_refuse_with_one_sentence(command):
    prompt = ["x"] if command == "run" else []
    done = CliRunner().invoke(main, [command, "demo", *prompt, "--max-ram", "9M"])
    assert done.exit_code == 1 and "--max-ram allows 9.00 MiB" in done.output
    assert done.output.count("\n") == 1
    done = CliRunner().invoke(main, [command, "demo", *prompt, "--max-ram", "much"])
    assert done.exit_code == 2 and "no amount of memory" in done.output


def test_run_without_panels_writes_the_same_text():
    common = ["run", "demo", "It was the", "-n", "5", "--temp", "0"]
    for extra in ([], ["--no-repack"], ["--max-ram", "4G"]):
        done = CliRunner().invoke(main, [*common, *extra])
        assert done.exit_code == 0 and done.stdout == "\ncommon\n"


SIZES = {"600M": 600 << 20, "2G": 2 * G, "1.5g": 3 * G // 2, "7": 7, "1 GiB": G, "10kb": 10240}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_have_units(text):
    assert footprint.parse_size(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "0", "-1", "G", "1X", "nan", "1e9", "2 000"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InvalidInput, match="amount of memory"):
        footprint.parse_size(text)
