"""`keelback bench`: the rows it prints, and what they are made of. Speed itself is not tested."""

from __future__ import annotations

import csv
import gc
import json
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from click.testing import CliRunner

from keelback.cli import main
from keelback.engine import bench
from keelback.engine.bandwidth import Probe, moved_bytes
from keelback.engine.model import Model
from keelback.kernels.errors import InvalidInput
from keelback.kernels.objects import addresses, callable_kernel

SMALL = ("-p", "8", "-n", "3", "-r", "2", "-t", "1")
#: What scripts that plot llama-bench's output look for.
FIELDS = {
    "build_commit", "cpu_info", "model_filename", "model_type", "model_size", "model_n_params",
    "n_threads", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts",
    "stddev_ts",
}  # fmt: skip


def keelback(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "keelback.cli", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Probe", lambda notice: Probe(notice, 1 << 20))


def rows(**plan) -> list[dict]:
    steps: list[tuple] = []
    return list(bench.bench(bench.Plan(**plan), print, lambda *step: steps.append(step)))


def test_json_is_an_array_of_llama_bench_rows():
    done = keelback("demo", *SMALL, "-d", "0,20", "-o", "json")
    # A first run says on standard error that it compiles.
    assert done.returncode == 0
    found = json.loads(done.stdout)
    tests = [(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in found]
    assert tests == [(8, 0, 0), (0, 3, 0), (8, 0, 20), (0, 3, 20)]
    for row in found:
        assert set(row) > FIELDS | {"samples_ns", "samples_ts"}
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == 2
        assert row["avg_ns"] > 0 and row["avg_ts"] > 0 and row["bandwidth_gbs"] > 0
        assert row["model_n_params"] == 4_681_832 and row["n_threads"] == 1
        assert row["state_bytes"] == 373_760 and row["state_bytes_per_token"] == 0
        # The probe's buffer is not counted.
        assert row["peak_rss"] is None or row["model_size"] < row["peak_rss"] < 400e6
        assert row["first_token_ms"] > row["jit_ms"] >= 0


def test_the_other_forms_hold_the_same_rows(little):
    arguments = ["bench", "-m", "demo", *SMALL, "-o"]
    forms = {form: CliRunner().invoke(main, [*arguments, form]) for form in ("md", "csv", "jsonl")}
    assert all(done.exit_code == 0 for done in forms.values())
    lines = forms["jsonl"].stdout.splitlines()
    assert [json.loads(line)["n_gen"] for line in lines] == [0, 3]
    table = list(csv.DictReader(forms["csv"].stdout.splitlines()))
    assert set(table[0]) > FIELDS and [row["n_gen"] for row in table] == ["0", "3"]
    head, rule, *body = forms["md"].stdout.splitlines()
    assert "| model " in head and set(rule) == set("| -:") and len(body) == 2
    assert len({line.count("|") for line in (head, rule, *body)}) == 1
    assert "pp8" in body[0] and "tg3" in body[1]


def test_lists_measure_every_combination(little):
    found = rows(threads=(1, 2), prompts=(4, 0), generated=(0, 2), repetitions=1)
    tests = [(row["n_threads"], row["n_prompt"], row["n_gen"]) for row in found]
    assert tests == [(1, 4, 0), (1, 0, 2), (2, 4, 0), (2, 0, 2)]
    assert all(row["stddev_ns"] == row["stddev_ts"] == 0 for row in found)


def test_a_depth_is_read_once(little, monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []
    forward = Model.forward

    def counting(self, ids, state=None, *rest, **more):
        read.append(len(ids))
        before = state.position if state is not None else 0
        assert len(ids) == 600 or before in (0, 600, 601, 602, 603)
        return forward(self, ids, state, *rest, **more)

    monkeypatch.setattr(Model, "forward", counting)
    rows(threads=(1,), prompts=(8,), generated=(2,), depths=(600,), repetitions=3)
    assert read.count(600) == 1 and read.count(8) == 4


def test_a_token_moves_its_weights_once_and_its_state_twice(demo: Model):
    tensors = demo.file.tensors
    weights = sum(info.nbytes for info in tensors.values())
    row = 256 // 32 * 34
    if "output.weight" in tensors:
        weights -= tensors["token_embd.weight"].nbytes
    assert demo.graph.nodes[0].out.width == 256
    assert moved_bytes(demo) == weights + row + 2 * 373_760


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_probe_reads_every_byte(threads: int):
    read = callable_kernel(addresses([("probe", "keelback.kernels.probe_cpu")], print)["probe"])
    values = np.ones(threads * 4 * 128, np.float32)
    record = np.array([values.ctypes.data, values.nbytes], np.int64)
    sums = np.zeros(threads, np.float32)
    for thread in range(threads):
        read(record.ctypes.data, sums.ctypes.data, thread, threads)
    assert sums.tolist() == [512.0] * threads
    assert Probe(print, 1 << 20).measure(threads) > 0


def test_the_probe_keeps_its_memory_for_threads_that_ctrl_c_leaves_behind():
    probe, reads, go_on = Probe(print, 1 << 20), threading.Event(), threading.Event()

    def read(record: int, sums: int, thread: int, threads: int) -> None:
        if thread == 0:
            reads.wait()
            raise KeyboardInterrupt
        reads.set()
        go_on.wait()

    probe._read, memory = read, weakref.ref(probe._buffer)
    with pytest.raises(KeyboardInterrupt):
        probe.measure(2)
    del probe
    gc.collect()
    kept = memory() is not None
    go_on.set()
    assert kept


BAD = {
    "nothing to do": (("-p", "0", "-n", "0"), 1, "nothing to measure"),
    "no repetitions": (("-r", "0"), 2, "0 is not in the range"),
    "a negative number": (("-p", "-5"), 2, "-5 is less than 0"),
    "too many threads": (("-t", "1,999"), 1, "999 threads"),
    "a word": (("-n", "many"), 2, "'many'"),
    "another form": (("-o", "sql"), 2, "'sql'"),
    "no such model": (("nowhere.gguf",), 1, "nowhere.gguf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_a_status(case: str):
    arguments, status, said = BAD[case]
    done = keelback(*arguments)
    assert done.returncode == status and not done.stdout
    assert said in done.stderr and "Traceback" not in done.stderr


def test_a_plan_is_checked_before_a_model_is_loaded():
    with pytest.raises(InvalidInput, match="-d -1"):
        rows(models=("nowhere.gguf",), depths=(-1,))
