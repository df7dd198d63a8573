"""The comparison with peers runs, with keelback alone; its figures are not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import modelfiles
from keelback import models
from keelback.engine.model import Model

SCRIPT = Path(__file__).parent / "bench" / "peers.py"
SMALL = {
    "mamba": modelfiles.mamba(64, 2, 48, 300),
    "mamba2": modelfiles.mamba2(64, 2, 16, 4, 300),
    "gdn": modelfiles.gated_deltanet(256, 2, 2, 256, 300),
}


@pytest.mark.parametrize("kind", modelfiles.TYPES)
@pytest.mark.parametrize("name", SMALL)
def test_made_files_run_and_stay_calm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
):
    monkeypatch.setattr(modelfiles, "MODELS", SMALL)
    path = modelfiles.model_file(tmp_path, name, kind)
    assert modelfiles.model_file(tmp_path, name, kind) == path
    logits, state = Model(path, 1, notice=lambda text: None).forward(list(range(40)))
    assert np.abs(logits).max() < 100 and state.position == 40
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "kind", [gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K], ids=["q4_k", "q6_k"]
)
def test_random_blocks_have_the_deviation_of_other_weights(kind: gguf.GGMLQuantizationType):
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
