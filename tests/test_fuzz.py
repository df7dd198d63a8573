"""A little fuzzing, the same inputs every time, and every input that once found something.

`python tests/fuzz/fuzz.py` does more of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

import fuzz
from targets import TARGETS

COUNT = 250


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_inputs_are_taken_or_refused_with_a_sentence(target: str):
    report = fuzz.fuzz(target, COUNT)
    assert not report.finds
    assert sum(report.ends.values()) == COUNT
    # Damage that nothing gets past, or that nothing notices, would test little.
    assert report.ends["taken"] > COUNT // 30 and report.ends["refused"] > COUNT // 3


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_that_found_something_stay_harmless(target: str):
    kept = sorted((fuzz.CORPUS / target).glob("*"))
    report = fuzz.replay(target, kept)
    assert not report.finds
    assert sum(report.ends.values()) == len(kept)


#: A worker whose inputs end badly in every way, and well in between.
BAD = """
import ctypes, os, signal
import worker
from keelback.kernels.errors import InvalidFile

class Bad:
    def __init__(self, folder): pass
    def mutated(self, random): return b""
    def run(self, path):
        what = path.read_bytes()
        if what == b"refuse": raise InvalidFile("no")
        if what == b"raise": raise KeyError("x")
        if what == b"exit": os._exit(3)
        if what == b"crash": ctypes.string_at(0)
        if what == b"loop":
            while True: pass
        if what == b"deaf":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            while True: pass
        if what == b"memory": bytes(3 << 30)

worker.SECONDS = 1
worker.TARGETS["bad"] = Bad
worker.main()
"""


def test_every_bad_end_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bad_worker.py").write_text(BAD)
    monkeypatch.setattr(fuzz, "WORKER", tmp_path / "bad_worker.py")
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(fuzz, "PATIENCE", 4)
    paths = [str(fuzz.HERE), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    ends = ["fine", "refuse", "raise", "exit", "crash", "fine", "loop", "deaf", "memory", "fine"]
    files = [tmp_path / f"{at}" for at in range(len(ends))]
    for file, end in zip(files, ends, strict=True):
        file.write_bytes(end.encode())
    report = fuzz.replay("bad", files)
    assert report.ends == {"taken": 3, "refused": 1, "found": 6}
    assert [content.decode() for _, content in report.finds] == [
        "raise", "exit", "crash", "loop", "deaf", "memory",
    ]  # fmt: skip
    said = dict((content.decode(), text) for text, content in report.finds)
    assert said["raise"].startswith("KeyError: 'x' at ") and "Hang" in said["loop"]
    assert "status -11" in said["crash"] and "status -9" in said["deaf"]
    assert said["memory"].startswith("MemoryError")
    assert len(fuzz.keep("bad", report)) == len(report.distinct()) == 6


def test_inputs_are_a_function_of_their_number(tmp_path: Path):
    target = TARGETS["tokenizer"](tmp_path)
    first, again, other = (target.mutated(Random(seed)) for seed in ("a", "a", "b"))
    assert first == again != other
