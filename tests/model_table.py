"""The README's table of models, made of what the goldens measure.

    python tests/model_table.py

runs every tiny checkpoint against its golden logits and writes the table anew; test_goldens.py then
holds every checkpoint to twice the error that its row admits to.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

import tiny
from distances import row_errors
from exchanged import TINY
from keelback.convert import convert
from keelback.engine.model import Model

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GOLDEN = Path(__file__).parent / "golden"
BEGIN, END = "<!-- models: tests/model_table.py -->\n", "<!-- end of models -->\n"
HEADER = (
    "| GGUF architecture | Models | model_type | held against | worst error |\n"
    "|---|---|---|---|---|\n"
)
#: What people call the models of an architecture.
MODELS = {
    "mamba": "Mamba, Falcon-Mamba",
    "mamba2": "Mamba-2, Codestral-Mamba",
    "jamba": "Jamba",
    "granitehybrid": "Granite-4-H (dense and experts), Bamba",
    "falcon-h1": "Falcon-H1",
    "nemotron_h": "Nemotron-H, Nemotron-3 Nano 4B",
    "nemotron_h_moe": "Nemotron-3 with experts, also latent ones",
    "qwen3next": "Qwen3-Next",
    "qwen35": "Qwen3.5, 3.6 and 3.8, dense",
    "qwen35moe": "Qwen3.5, 3.6 and 3.8 with experts",
    "kimi-linear": "Kimi Linear",
    "bailingmoe3": "Ling-3.0",
    "lfm2": "LFM2, LFM2.5",
    "lfm2moe": "LFM2 with experts",
    "olmo-hybrid": "OLMo-Hybrid",
    "gated-deltanet": "Gated DeltaNet of flash-linear-attention",
    "kda": "Kimi Delta Attention of flash-linear-attention",
}


def error_of(name: str, path: Path) -> float:
    """The largest relative L2 error of a row of logits."""
    golden = np.load(GOLDEN / f"{name}.npz")
    model = Model(path, notice=lambda text: None, cache_type_k="f32", cache_type_v="f32")
    logits, _ = model.forward(golden["ids"], logits="all")
    return float(row_errors(logits, golden["logits"]).max())


def reference_of(name: str) -> str:
    """The library that made a golden, and its version."""
    made = str(np.load(GOLDEN / f"{name}.npz")["made"])
    found = re.search(r"flash-linear-attention (\d+\.\d+)", made)
    if found:
        return f"fla {found[1]}"
    found = re.search(r"transformers (\d+\.\d+)", made)
    assert found
    return f"transformers {found[1]}"


def rounded_up(error: float) -> str:
    """One digit, as 3e-6."""
    power = math.floor(math.log10(error))
    digit = math.ceil(error / 10**power - 1e-9)
    return f"{digit}e{power}" if digit < 10 else f"1e{power + 1}"


def table() -> str:
    """The table, measured."""
    errors: dict[str, float] = defaultdict(float)
    types, references = defaultdict(set), defaultdict(set)
    exchanged = set()
    with tempfile.TemporaryDirectory() as folder:
        for name, variant in tiny.VARIANTS.items():
            checkpoint = tiny.write_checkpoint(name, Path(folder, name))
            path = convert(checkpoint, Path(folder, f"{name}.gguf"), "f32")
            model = Model(path, notice=lambda text: None)
            architecture = str(model.metadata["general.architecture"])
            errors[architecture] = max(errors[architecture], error_of(name, path))
            types[architecture].add(variant.model_type.removesuffix("_text"))
            references[architecture].add(reference_of(name))
            if name in TINY:
                exchanged.add(architecture)
    lines = []
    for architecture, models in MODELS.items():
        against = sorted(references[architecture], reverse=True)
        against += ["llama.cpp"] if architecture in exchanged else []
        kinds = ", ".join(f"`{kind}`" for kind in sorted(types[architecture]))
        worst = rounded_up(errors[architecture])
        lines.append(
            f"| `{architecture}` | {models} | {kinds} | {', '.join(against)} | {worst} |\n"
        )
    assert errors.keys() == MODELS.keys(), errors.keys() ^ MODELS.keys()
    return HEADER + "".join(lines)


def claimed() -> dict[str, float]:
    """What the README admits to: the worst error by architecture."""
    text = README.read_text("utf-8")
    part = text[text.index(BEGIN) : text.index(END)]
    rows = re.findall(r"^\| `([^`]+)` \|.*\| (\de-\d) \|$", part, re.MULTILINE)
    return {architecture: float(error) for architecture, error in rows}


def main() -> None:
    """Write the table into the README."""
    text = README.read_text("utf-8")
    before, rest = text.split(BEGIN)
    _, behind = rest.split(END)
    README.write_text(before + BEGIN + table() + END + behind, encoding="utf-8")


if __name__ == "__main__":
    main()
