"""keelback's quantizer beside llama.cpp's: the same float32 file, the same types, the same text.

    python tests/bench/quality.py MODEL-f32.gguf TEXT [--tools FOLDER] [--types Q4_K_M,...]

Every type is written by llama-quantize (of the folder KEELBACK_LLAMACPP_TOOLS, or --tools), by
keelback with llama.cpp's mixture (`plain`), and with its own, each without and with an importance
matrix, collected from the text --importance. keelback then reads TEXT with all of them, so that the
weights are all that differs. Differences from llama.cpp are paired over blocks of the text; below
zero, keelback's file is the better one. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keelback.convert.mixture import Wishes
from keelback.convert.quantize import Quantization
from keelback.engine.divergence import diverge
from keelback.engine.importance import collect, watch
from keelback.engine.model import Model
from keelback.engine.perplexity import carried, chunks_of, compare, estimate, log_probabilities
from keelback.kernels.formats import imatrix

TYPES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,IQ4_XS"
#: Who writes a file; keelback's wishes.
OURS = {"plain": Wishes(plain=True), "keelback": Wishes()}
CHUNK = 512
HEADER = (
    f"{'type':8} {'imatrix':7} {'by':9} | {'MiB':>8} {'ppl':>9} {'mean KL':>9} | "
    f"{'nats from llama.cpp':>22} {'KL from llama.cpp':>22}"
)


def main() -> None:
    options = arguments()
    model = opened(options.model)
    ids = np.array(model.tokenizer.encode(options.text.read_text())[: options.tokens + 1])
    base = [log_probabilities(rows.logits) for rows in carried(model, ids)]
    print(f"{options.model.name}: {len(ids) - 1} tokens\n{HEADER}", flush=True)
    report = []
    with tempfile.TemporaryDirectory() as folder:
        matrix = Path(folder) / "imatrix.gguf"
        collected(options.model, options.importance, options.chunks, matrix)
        for kind in options.types.split(","):
            for importance in (None, matrix):
                report += compared(options, kind, importance, Path(folder), ids, base)
    print(json.dumps({"model": options.model.name, "tokens": len(ids) - 1, "rows": report}))


def compared(
    options: argparse.Namespace,
    kind: str,
    matrix: Path | None,
    folder: Path,
    ids: np.ndarray,
    base: list[np.ndarray],
) -> Iterator[dict[str, Any]]:
    """A row for each writer of a type; prints them."""
    theirs: np.ndarray | None = None
    for name in ("llama.cpp", *OURS):
        target = folder / "out.gguf"
        write(options, name, kind, matrix, target)
        nll, _, kl, _ = measured(target, ids, base)
        if theirs is None:
            theirs = np.array([nll, kl])
        apart = [compare(mine, other) for mine, other in zip((nll, kl), theirs, strict=True)]
        row = {
            "type": kind,
            "imatrix": matrix is not None,
            "by": name,
            "bytes": target.stat().st_size,
            "ppl": math.exp(nll.mean()),
            "kl": estimate(kl).mean,
            "nll_from_llamacpp": [apart[0].mean, apart[0].error],
            "kl_from_llamacpp": [apart[1].mean, apart[1].error],
        }
        cells = " ".join(f"{part.mean:+11.6f} ± {part.error:.6f}" for part in apart)
        print(
            f"{kind:8} {'yes' if matrix else 'no':7} {name:9} | {row['bytes'] / 2**20:8.2f} "
            f"{row['ppl']:9.4f} {row['kl']:9.6f} | {'' if name == 'llama.cpp' else cells}",
            flush=True,
        )
        yield row


def write(
    options: argparse.Namespace, name: str, kind: str, matrix: Path | None, target: Path
) -> None:
    """Let one of them quantize the model."""
    if name in OURS:
        Quantization(options.model, kind, OURS[name], matrix).write(target)
        return
    more = [] if matrix is None else ["--imatrix", str(matrix)]
    tool = options.tools / "llama-quantize"
    command = [tool, *more, options.model, target, kind]
    subprocess.run(command, check=True, capture_output=True)


def measured(path: Path, ids: np.ndarray, base: list[np.ndarray]) -> np.ndarray:
    """Of every token what `diverge` tells: (4, n)."""
    model = opened(path)
    found = [
        diverge(rows.logits, expected, rows.targets)
        for rows, expected in zip(carried(model, ids), base, strict=True)
    ]
    return np.concatenate(found, axis=1)


def collected(path: Path, text: Path, most: int, target: Path) -> None:
    """Write the importance matrix of the model over a text."""
    watched: dict[str, Any] = {}
    model = opened(path, amend=lambda graph: watched.update(watch(graph)))
    chunks = chunks_of(model, text.read_text(), CHUNK, most, special=False)
    found, _ = collect(model, watched, chunks, lambda *step: None)
    imatrix.write(target, found)


def opened(path: Path, **more: Any) -> Model:
    return Model(path, notice=lambda text: None, **more)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--importance", type=Path, required=True, metavar="TEXT")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument(
        "--tools", type=Path, default=Path(os.environ.get("KEELBACK_LLAMACPP_TOOLS", "."))
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
