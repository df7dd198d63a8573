"""The comparison with peers runs, with keelback alone; its figures are not tested."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import hybridfiles
import numpy as np
import pytest
from randomblocks import RANDOM

import formats
import modelfiles
from keelback import models
from keelback.engine.model import Model
from keelback.kernels.formats.blocks import NATIVE

SCRIPT = Path(__file__).parent / "bench" / "peers.py"
SMALL = {
    "mamba": modelfiles.mamba(64, 2, 48, 300),
    "mamba2": modelfiles.mamba2(64, 2, 16, 4, 300),
    "gdn": modelfiles.gated_deltanet(256, 2, 2, 256, 300),
    "qwen": hybridfiles.qwen35(256, 4, 2, 1, 16, 256, vocabulary=300),
    "qwen-moe": hybridfiles.qwen35(256, 4, 2, 1, 16, 256, 16, vocabulary=300),
    "granite": hybridfiles.granite(768, [False, True], 24, 512, vocabulary=300),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*itertools.product(SMALL, modelfiles.TYPES), *(("gdn", kind) for kind in modelfiles.PURE)],
)
def test_made_files_run_and_stay_calm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
):
    monkeypatch.setattr(modelfiles, "MODELS", SMALL)
    path = modelfiles.model_file(tmp_path, name, kind)
    assert modelfiles.model_file(tmp_path, name, kind) == path
    logits, state = Model(path, 1, notice=lambda text: None).forward(list(range(40)))
    assert np.abs(logits).max() < 100 and state.position == 40
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_random_blocks_have_the_deviation_of_other_weights(name: str):
    kind = gguf.GGMLQuantizationType[name]
    data = modelfiles.encoded(np.random.default_rng(0), (64, 256), modelfiles.normal, kind)
    values = gguf.quants.dequantize(np.frombuffer(data, np.uint8).reshape(64, -1), kind)
    assert np.isfinite(values).all() and 0.01 < values.std() < 0.04
    assert abs(values.mean()) < 0.005


def test_a_comparison_ends_in_json(tmp_path: Path):
    command = [
        *(sys.executable, str(SCRIPT), "speed", "--models", str(models.DEMO), "--peers", ""),
        *("--threads", "1", "--prompt", "16", "--generate", "32", "--repeat", "1", "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (row,) = report["speed"]
    assert row["engine"] == "keelback" and row["decode_ratio"] == row["prefill_ratio"] == 1
    assert row["moved_bytes_per_token"] > 4_681_832 and row["bandwidth_share"] > 0


def test_the_table_of_formats_has_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "WEIGHTS", 1 << 16)
    monkeypatch.setattr(formats, "DRAWN", 32)
    monkeypatch.setattr(formats, "Probe", lambda notice: SimpleNamespace(measure=lambda threads: 1))
    said: list[str] = []
    rows = formats.formats(
        SimpleNamespace(say=said.append, folder=tmp_path, threads=["1"], repeat=1)
    )
    assert {row["format"] for row in rows} == {block.name for block in NATIVE}
    assert all(row["matrix_operations_per_second"] > 0 for row in rows)
    assert len(said) == 1 + len(rows) and not list(tmp_path.iterdir())
