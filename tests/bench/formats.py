"""A table of the formats that have kernels: one large matrix against a token, and against 512.

A matrix stands alone between an embedding and a sum, and is far larger than any cache, so that
the time of a token is the time in which its bytes arrive.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np

from keelback.engine.backend import MAX_ROWS, Batch
from keelback.engine.bandwidth import Probe
from keelback.engine.cpu import CpuBackend
from keelback.engine.state import Layout, State
from keelback.engine.threads import CancelFlag, pool
from keelback.engine.weights import WeightStore
from keelback.kernels.formats.gguf import GGUF
from keelback.kernels.op import Weight
from keelback.models.graph import Graph
from modelfiles import encoded, normal

FORMATS = (
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4",
    "Q3_K", "Q2_K", "F16", "BF16", "F32",
)  # fmt: skip
#: Columns of the matrix, and its weights: 144 MB at 4 bits.
WIDTH, WEIGHTS = 2048, 1 << 28
#: Rows that are drawn at random; the rest repeat them.
DRAWN = 1024
HEADER = (
    f"{'format':6} {'t':>2} | {'mat-vec GB/s':>12} {'share':>6} {'G weights/s':>12} | "
    f"{'mat-mat Gop/s':>13} | {'GB/s':>5}"
)


def formats(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Mat-vec and mat-mat of every format on every number of threads."""
    probe, rows = Probe(options.say), []
    options.say(HEADER)
    for name in FORMATS:
        path = _matrix_file(options.folder, name)
        for threads in map(int, options.threads):
            rows.append({"format": name, **_measure(path, threads, probe, options.repeat)})
            options.say(_line(rows[-1]))
        path.unlink()
    return rows


def _matrix_file(folder: Path, name: str) -> Path:
    """A GGUF file with a small F32 embedding, the matrix, and a row of ones."""
    block = gguf.GGMLQuantizationType[name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[block]
    rows = WEIGHTS // WIDTH
    random = np.random.default_rng(0)
    part = np.frombuffer(encoded(random, (DRAWN, WIDTH), normal, block), np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path := folder / f"matrix-{name.lower()}.gguf", "matrix")
    writer.add_tensor("embedding", normal(random, (16, WIDTH)))
    writer.add_tensor("sum", np.ones((1, rows), np.float32))
    matrix = np.tile(part, rows // DRAWN).reshape(rows, WIDTH // elements * nbytes)
    writer.add_tensor("matrix", matrix, raw_dtype=block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _measure(path: Path, threads: int, probe: Probe, repeat: int) -> dict[str, Any]:
    file = GGUF(path)
    backend, layout = _backend(file, threads)
    size = file.tensors["matrix"].nbytes
    state = State.fresh(layout, "bench")

    def seconds(rows: int) -> float:
        ids, last = np.zeros(rows, np.int64), np.array([rows - 1])
        batch = Batch(ids, np.array([0, rows]), [state], last)
        began = time.perf_counter()
        pool().call(lambda: backend.forward(batch), CancelFlag())
        return time.perf_counter() - began

    seconds(1), seconds(MAX_ROWS)
    vector, shares, read = [], [], []
    for _ in range(3 * repeat):
        read.append(probe.measure(threads))
        vector.append(median(seconds(1) for _ in range(3)))
        shares.append(size / vector[-1] / read[-1])
    matrix = [seconds(MAX_ROWS) for _ in range(repeat)]
    return {
        "threads": threads,
        "vector_bytes_per_second": size / median(vector),
        "bandwidth_share": median(shares),
        "weights_per_second": WEIGHTS / median(vector),
        "matrix_operations_per_second": 2 * MAX_ROWS * WEIGHTS / median(matrix),
        "probed_bytes_per_second": median(read),
    }


def _backend(file: GGUF, threads: int) -> tuple[CpuBackend, Layout]:
    weights = {name: Weight(name, info.shape, info.block) for name, info in file.tensors.items()}
    graph = Graph()
    x = graph.embedding(weights["embedding"], width=WIDTH)
    y = graph.linear(x, weights["matrix"], width=WEIGHTS // WIDTH)
    graph.finish(graph.linear(graph.select(y), weights["sum"], width=1))
    layout = Layout.of(graph)
    backend = CpuBackend(graph, WeightStore(file, print), layout, threads, print)
    backend.load()
    return backend, layout


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['format']:6} {row['threads']:2} | {row['vector_bytes_per_second'] / 1e9:12.1f} "
        f"{row['bandwidth_share']:6.0%} {row['weights_per_second'] / 1e9:12.1f} | "
        f"{row['matrix_operations_per_second'] / 1e9:13.0f} | "
        f"{row['probed_bytes_per_second'] / 1e9:5.1f}"
    )
