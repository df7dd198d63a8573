"""Converting a large checkpoint against copying its bytes, in turn, with the peak of memory.

    python tests/bench/conversion.py [--gigabytes 8] [--types auto,q8_0] [--repeat 3]

The checkpoint is a Mamba-2 in shards of bfloat16 with random weights, made once and kept in
--folder. Disks remember what was written lately: everything is flushed before each turn, and each
turn ends when its file is on the disk. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

CLI = [sys.executable, "-m", "keelback.cli"]
SHARD_BYTES = 2 << 30
#: Mamba-2 in the proportions of the 7-billion-parameter models there are.
WIDTH, HEADS, HEAD, GROUPS, STATE, TAPS, VOCABULARY = 4096, 128, 64, 8, 128, 4, 32768
INNER, CHANNELS = HEADS * HEAD, HEADS * HEAD + 2 * GROUPS * STATE


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--types", default="auto,q8_0")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "keelback-bench"
    )
    options = parser.parse_args()
    checkpoint = make(options.folder, options.gigabytes)
    target = options.folder / "out"
    turns: dict[str, Callable[[], int]] = {"copy": lambda: copy(checkpoint, target)}
    for kind in options.types.split(","):
        turns[kind] = lambda kind=kind: convert(checkpoint, target, kind)  # type: ignore[misc]
    rows: dict[str, list[tuple[float, int]]] = {name: [] for name in turns}
    for _ in range(options.repeat):
        for name, turn in turns.items():
            rows[name].append(timed(turn))
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    report = {name: summary(rows[name], rows["copy"]) for name in turns}
    for name, row in report.items():
        print(
            f"{name:6} {row['seconds']:6.1f} s, {row['ratio']:.2f} of the copy, peak {row['peak']}"
        )
    largest = 2 * max(VOCABULARY, 2 * INNER + 2 * GROUPS * STATE + HEADS) * WIDTH
    print(json.dumps({"bytes": size(checkpoint), "largest_tensor": largest, **report}))


def make(folder: Path, gigabytes: float) -> Path:
    """The checkpoint's folder, written when it is not there."""
    checkpoint = folder / f"mamba2-{gigabytes:g}gb"
    if (checkpoint / "config.json").exists():
        return checkpoint
    checkpoint.mkdir(parents=True, exist_ok=True)
    per_layer = sum(2 * math.prod(shape) for _, shape in layer(0))
    layers = max(1, int((gigabytes * 1e9 - 4 * VOCABULARY * WIDTH) / per_layer))
    shard: dict[str, tuple[int, ...]] = {}
    where: dict[str, str] = {}
    number = 0
    names = [*ends(), *(item for i in range(layers) for item in layer(i))]
    for i, (name, shape) in enumerate(names):
        shard[name] = shape
        if i + 1 == len(names) or sum(2 * math.prod(s) for s in shard.values()) > SHARD_BYTES:
            number += 1
            file = f"model-{number:05d}.safetensors"
            write(checkpoint / file, shard)
            where |= dict.fromkeys(shard, file)
            shard = {}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {
        "model_type": "mamba2", "hidden_size": WIDTH, "num_hidden_layers": layers,
        "num_heads": HEADS, "head_dim": HEAD, "n_groups": GROUPS, "state_size": STATE,
        "conv_kernel": TAPS, "expand": 2, "vocab_size": VOCABULARY,
    }  # fmt: skip
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def ends() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "backbone.embeddings.weight", (VOCABULARY, WIDTH)
    yield "backbone.norm_f.weight", (WIDTH,)
    yield "lm_head.weight", (VOCABULARY, WIDTH)


def layer(i: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    mixer = f"backbone.layers.{i}.mixer"
    yield f"backbone.layers.{i}.norm.weight", (WIDTH,)
    yield f"{mixer}.in_proj.weight", (INNER + CHANNELS + HEADS, WIDTH)
    yield f"{mixer}.conv1d.weight", (CHANNELS, 1, TAPS)
    yield f"{mixer}.conv1d.bias", (CHANNELS,)
    for name in ("A_log", "D", "dt_bias"):
        yield f"{mixer}.{name}", (HEADS,)
    yield f"{mixer}.norm.weight", (INNER,)
    yield f"{mixer}.out_proj.weight", (WIDTH, INNER)


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 numbers of ordinary size, random in every other bit."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    random = np.random.default_rng(len(shapes))
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(at, 0, -(64 << 20)):
            bits = random.integers(0, 1 << 16, min(left, 64 << 20) // 2, np.uint16)
            # Signs and fractions at random, exponents of 2^-9 to 2^-2.
            file.write(((bits & 0x83FF) | 0x3C00).tobytes())


def copy(checkpoint: Path, target: Path) -> int:
    """Copy the files as the system does it best; nothing of them passes through this process."""
    target.mkdir()
    for path in checkpoint.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
    return 0


def convert(checkpoint: Path, target: Path, kind: str) -> int:
    """Convert in a process of its own; returns the peak of its resident memory in bytes."""
    command = [*CLI, "convert", str(checkpoint), "-o", str(target), "--outtype", kind]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, status
    return usage.ru_maxrss << 10


def timed(turn: Callable[[], int]) -> tuple[float, int]:
    os.sync()
    began = time.perf_counter()
    peak = turn()
    os.sync()
    return time.perf_counter() - began, peak


def summary(rows: list[tuple[float, int]], copies: list[tuple[float, int]]) -> dict[str, float]:
    ratios = [row[0] / copied[0] for row, copied in zip(rows, copies, strict=True)]
    return {
        "seconds": median(seconds for seconds, _ in rows),
        "ratio": median(ratios),
        "peak": max(peak for _, peak in rows),
    }


def size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


if __name__ == "__main__":
    main()
