"""`quantize --report`: each tensor's cost is that of a file in which it alone is rounded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from keelback.cli import main
from keelback.convert.mixture import Wishes, override
from keelback.convert.quantize import Quantization
from keelback.engine import report as reporting
from keelback.engine.model import Model
from keelback.engine.perplexity import log_probabilities
from keelback.kernels.formats import blocks

TEXT = "It was the best of times, it was the worst of times, and the count of words goes on. " * 3


@pytest.fixture(scope="module")
def f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, widened."""
    path = tmp_path_factory.mktemp("report") / "demo-f32.gguf"
    done = CliRunner().invoke(
        main, ["quantize", str(demo_path()), str(path), "F32", "--allow-requantize"]
    )
    assert done.exit_code == 0, done.output
    return path


def demo_path() -> Path:
    return Path(Model("demo", 1, backend="numpy").file.path)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text").write_text(TEXT)
    return str(tmp_path / "text")


def reported(f32: Path, text: str, *options: str) -> list[dict]:
    done = CliRunner().invoke(
        main,
        ["quantize", str(f32), "x.gguf", "Q4_0", "--dry-run", "--report", text, "--json", *options],
    )
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["report"]


def test_costs_are_those_of_a_file_with_one_tensor_rounded(f32: Path, text: str, tmp_path: Path):
    rows = reported(f32, text)
    assert [row["kl"] for row in rows] == sorted((row["kl"] for row in rows), reverse=True)
    name = next(row["name"] for row in rows if row["type"] == "Q4_0")
    alone = tmp_path / "alone.gguf"
    wishes = Wishes(overrides=(override(f"^{name}$=Q4_0"), override(".=F32")))
    Quantization(f32, "Q4_0", wishes).write(alone)
    exact, rounded = (Model(path, 1, notice=lambda text: None) for path in (f32, alone))
    assert rounded.file.tensors[name].block.name == "Q4_0"
    # A matrix in blocks meets rounded activations, one that was widened again does not.
    widened = tmp_path / "widened.gguf"
    Quantization(alone, "F32", allow_requantize=True).write(widened)
    rounded = Model(widened, 1, notice=lambda text: None)
    ids = exact.tokenizer.encode(TEXT)
    (a, s), (b, r) = (model.forward(ids[:-1], logits="all") for model in (exact, rounded))
    p, q = log_probabilities(a).astype(np.float64), log_probabilities(b).astype(np.float64)
    row = next(row for row in rows if row["name"] == name)
    assert row["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-3)
    off, norm = np.linalg.norm(np.concatenate(_flat(s)) - np.concatenate(_flat(r))), _flat(s)
    assert row["state_error"] == pytest.approx(off / np.linalg.norm(np.concatenate(norm)), rel=1e-4)
    info = exact.file.tensors[name]
    before, after = (
        blocks.dequantize(model.file.data(info), info.block, info.shape)
        for model, info in ((exact, info), (rounded, rounded.file.tensors[name]))
    )
    assert row["error"] == pytest.approx(
        np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-6
    )


def _flat(state) -> list[np.ndarray]:
    return [tensor.astype(np.float64).reshape(-1) for tensor in state.tensors().values()]


def test_what_is_not_rounded_costs_nothing(f32: Path):
    model = Model(f32, 1, notice=lambda text: None)
    name = next(name for name, info in model.file.tensors.items() if len(info.shape) == 2)
    same = np.array(model.file.data(model.file.tensors[name]))
    rounding = reporting.Rounding(name, "F32", same.nbytes, lambda: (same, 0.0))
    (row,) = reporting.report(str(f32), [rounding], TEXT, 1, lambda text: None, lambda *step: None)
    # What is expected is kept in float32.
    assert row["kl"] == pytest.approx(0, abs=1e-6) and row["state_error"] == 0


def test_a_report_is_a_table_too_and_comes_before_the_file(f32: Path, text: str, tmp_path: Path):
    target = tmp_path / "out.gguf"
    arguments = ["quantize", str(f32), str(target), "Q8_0", "--report"]
    done = CliRunner().invoke(main, [*arguments, text])
    assert done.exit_code == 0 and target.exists(), done.output
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["tensor", "type", "size"]
    assert lines[-1].startswith(str(f32))
    target.unlink()
    done = CliRunner().invoke(main, [*arguments, str(tmp_path / "none")])
    assert done.exit_code == 1 and "cannot be read" in done.output and not target.exists()
    (tmp_path / "empty").write_text("")
    done = CliRunner().invoke(main, [*arguments, str(tmp_path / "empty")])
    assert done.exit_code == 1 and "empty is empty" in done.output and not target.exists()
    (tmp_path / "short").write_text("It was")
    done = CliRunner().invoke(main, [*arguments, str(tmp_path / "short")])
    assert done.exit_code == 1 and "give one of some hundred" in done.output


def test_what_is_rounded_already_is_refused(text: str, tmp_path: Path):
    done = CliRunner().invoke(
        main,
        ["quantize", str(demo_path()), str(tmp_path / "x"), "Q4_0", "--allow-requantize",
         "--report", text],
    )  # fmt: skip
    assert done.exit_code == 1 and "a report needs an F16, BF16 or F32 file" in done.output
