"""What a command writes is never what it reads, and a failed run leaves what was saved before."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import tiny
from keelback import cli, models
from keelback.convert.edit import split
from keelback.kernels.formats import imatrix
from keelback.kernels.formats.gguf import GGUF


def keelback(command: str) -> Result:
    return CliRunner().invoke(cli.main, command.split(), input="")


@pytest.fixture
def folder(tmp_path: Path, tiny_file, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of everything that commands read, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(models.DEMO, "model.gguf")
    split("model.gguf", "part", max_tensors=-(-len(GGUF("model.gguf").tensors) // 3))
    shutil.copy(tiny_file("mamba-wide", "f32"), "wide.gguf")
    Path("text.txt").write_text("Whan that Aprille with his shoures soote " * 20)
    Path("t.jinja").write_text("{{ messages[0].content }}")
    tiny.write_checkpoint("mamba-wide", tmp_path / "checkpoint")
    sums, counts = {"a": np.ones((1, 8), np.float32)}, {"a": np.ones(1, np.float32)}
    imatrix.write("i.gguf", imatrix.Importance(sums, counts, ["text.txt"], 1, 8))
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "run model.gguf It -n 1 --state-out model.gguf",
        "run part-00001-of-00003.gguf It -n 1 --state-out part-00002-of-00003.gguf",
        "run model.gguf -f text.txt -n 1 --state-out ./text.txt",
        "run model.gguf It -n 1 --chat-template-file t.jinja --state-out t.jinja",
        "convert checkpoint --outtype q4_0 --imatrix i.gguf -o i.gguf",
        "quantize wide.gguf i.gguf Q4_0 --imatrix i.gguf",
        "quantize wide.gguf text.txt Q4_0 --report text.txt",
        "quantize wide.gguf wide.gguf Q4_0",
        "imatrix model.gguf -f text.txt -o text.txt",
        "perplexity model.gguf -f text.txt -c 16 --kl-divergence-base text.txt",
        "gguf merge part-00001-of-00003.gguf part-00003-of-00003.gguf",
    ],
)
def test_what_is_read_is_not_written_over(folder: Path, command: str):
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    done = keelback(command)
    assert done.exit_code == 1 and "name another file to write" in done.stderr, done.stderr
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_run_that_reads_nothing_leaves_the_state_that_was_saved(folder: Path):
    assert keelback("run wide.gguf 5,7,9 -n 2 --state-out good").exit_code == 0
    before = Path("good").read_bytes()
    done = keelback("run wide.gguf 5,99999999 -n 2 --state-out good")
    assert done.exit_code == 1 and "good stays as it was" in done.stderr
    assert Path("good").read_bytes() == before
