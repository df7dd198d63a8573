"""Checkpoints in every layout: the same file from all layouts of a model, and its logits."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

import keelback
import tiny
import tiny_layouts
from distances import row_errors
from keelback.convert import convert
from keelback.kernels.formats.gguf import GGUF

FILES = [
    "tiny_layouts",
    *(file.stem for file in sorted(Path(__file__).parent.glob("layouts_*.py"))),
]
PARTS = [importlib.import_module(file).LAYOUTS for file in FILES]
LAYOUTS = {name: layout for part in PARTS for name, layout in part.items()}
GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4


def contents(path: Path, layout: tiny_layouts.Layout) -> tuple[dict[str, object], dict[str, tuple]]:
    """Metadata but for the name, and all of every tensor."""
    file, config = GGUF(path), layout.config(tiny.VARIANTS[layout.variant].config)
    # Neither mamba_ssm nor Mistral says in a config which tokens begin and end a text.
    unsaid = ("general.name", *(["_token_id"] if "eos_token_id" not in config else []))
    pairs = {key: value for key, value in file.metadata.items() if not key.endswith(unsaid)}
    tensors = file.tensors.values()
    return (
        {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in pairs.items()},
        {t.name: (t.shape, t.block.name, file.data(t).tobytes()) for t in tensors},
    )


def test_no_name_stands_for_two_layouts():
    assert len(LAYOUTS) == sum(len(part) for part in PARTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_file_of_its_model_and_the_logits_of_the_reference(
    name: str, tiny_file, tmp_path: Path
):
    layout = LAYOUTS[name]
    path = convert(tiny_layouts.write(layout, tmp_path), tmp_path / "out.gguf", "f32")
    assert contents(path, layout) == contents(tiny_file(layout.variant, "f32"), layout)
    golden = np.load(GOLDEN / f"{layout.variant}.npz")
    # References keep keys and values in float32.
    model = keelback.Model(path, threads=1, cache_type_k="f32", cache_type_v="f32")
    logits, _ = model.forward(golden["ids"], logits="all")
    assert row_errors(logits, golden["logits"]).max() < TOLERANCE
