"""Measures a model file: the tests, the names and the units of llama.cpp's `llama-bench`.

`pp` reads a prompt, `tg` reads tokens one by one; nothing is sampled. A depth is read once and its
state copied for every repetition. Beside each test the memory's read bandwidth is probed, for a
token cannot come faster than its bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from ..kernels.cores import processors
from ..kernels.errors import InvalidInput
from ..kernels.objects import compile_seconds
from . import platform
from .backend import MAX_ROWS, Progress
from .bandwidth import Probe, moved_bytes
from .cpu import check_threads
from .model import Model
from .state import State
from .wording import version

Notice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: every combination of the lists, as llama-bench does it."""

    models: Sequence[str] = ("demo",)
    threads: Sequence[int] = ()
    prompts: Sequence[int] = (512,)
    generated: Sequence[int] = (128,)
    depths: Sequence[int] = (0,)
    repetitions: int = 5
    repack: bool | None = None
    max_ram: int | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    state_type: str = "f32"

    def check(self) -> None:
        """Raise InvalidInput for numbers that cannot be meant."""
        counts = {"-p": self.prompts, "-n": self.generated, "-d": self.depths}
        for flag, values in counts.items():
            if any(value < 0 for value in values):
                raise InvalidInput(f"{flag} {min(values)} is negative; give a number of tokens")
        if self.repetitions < 1:
            raise InvalidInput(f"-r {self.repetitions} measures nothing; give 1 or more")
        if not any([*self.prompts, *self.generated]):
            raise InvalidInput("there is nothing to measure: give -p or -n a number of tokens")
        for threads in self.threads:
            check_threads(threads)


@dataclass(frozen=True, slots=True)
class Test:
    """One row: a prompt or tokens one by one, behind `depth` tokens."""

    prompt: int
    generated: int
    depth: int

    @property
    def tokens(self) -> int:
        """Tokens of one repetition."""
        return self.prompt or self.generated

    @property
    def name(self) -> str:
        """As llama-bench prints it."""
        job = f"pp{self.prompt}" if self.prompt else f"tg{self.generated}"
        return f"{job} @ d{self.depth}" if self.depth else job


@dataclass
class Loaded:
    """A model, and what its start took."""

    model: Model
    threads: int
    first_token_ms: float
    jit_ms: float
    peak: int | None
    facts: dict[str, Any]


def bench(plan: Plan, notice: Notice, progress: Progress) -> Iterator[dict[str, Any]]:
    """Rows, each as soon as it is measured. Raises InvalidInput before the first."""
    plan.check()
    for path in plan.models:
        for threads in plan.threads or [processors()]:
            yield from _rows(plan, path, threads, notice, progress)


def _rows(
    plan: Plan, path: str, threads: int, notice: Notice, progress: Progress
) -> Iterator[dict[str, Any]]:
    loaded = _load(plan, path, threads, notice, progress)
    for depth in plan.depths:
        state = _at_depth(loaded.model, depth, progress)
        for test in _tests(plan, depth):
            yield _measure(loaded, test, state, plan.repetitions, notice, progress)


def _tests(plan: Plan, depth: int) -> list[Test]:
    prompts = [Test(count, 0, depth) for count in plan.prompts if count]
    return prompts + [Test(0, count, depth) for count in plan.generated if count]


def _load(plan: Plan, path: str, threads: int, notice: Notice, progress: Progress) -> Loaded:
    platform.reset_peak()
    compiled, began = compile_seconds(), time.perf_counter()
    model = Model(
        path, threads, notice=notice, progress=progress, repack=plan.repack, max_ram=plan.max_ram,
        cache_type_k=plan.cache_type_k, cache_type_v=plan.cache_type_v, state_type=plan.state_type,
    )  # fmt: skip
    model.forward([0])
    seconds, jit = time.perf_counter() - began, compile_seconds() - compiled
    peak = platform.peak_resident()
    return Loaded(model, threads, seconds * 1e3, jit * 1e3, peak, _facts(model))


def _facts(model: Model) -> dict[str, Any]:
    """What llama-bench tells about a model, as far as it means something here."""
    infos = model.file.tensors.values()
    parameters = sum(math.prod(info.shape) for info in infos)
    architecture = model.metadata.get("general.architecture")
    sizes: dict[str, int] = {}
    for info in infos:
        sizes[info.block.name] = sizes.get(info.block.name, 0) + info.nbytes
    kind = max(sizes, key=lambda name: sizes[name])
    return {
        "build_commit": version(),
        "cpu_info": platform.processor_name(),
        "backends": "CPU",
        "model_filename": str(model.file.path),
        "model_type": f"{architecture} {_count(parameters)} {kind}",
        "model_size": sum(info.nbytes for info in infos),
        "model_n_params": parameters,
        "n_batch": MAX_ROWS,
        "n_ubatch": MAX_ROWS,
    }


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"


def _at_depth(model: Model, depth: int, progress: Progress) -> State:
    """The state behind `depth` tokens, read once."""
    state = model.new_state()
    if depth:
        label = f"reading {depth} tokens"
        ids = _ids(model, depth)
        model.forward(ids, state, progress=lambda done: progress(label, done, depth))
    return state


def _ids(model: Model, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.vocabulary, count)


def _measure(
    loaded: Loaded, test: Test, start: State, repetitions: int, notice: Notice, progress: Progress
) -> dict[str, Any]:
    """One row: a warm-up, then the repetitions with a probe of the bandwidth before each."""
    model = loaded.model
    ids = _ids(model, test.tokens)
    _play(model, test, ids[: MAX_ROWS if test.prompt else 4], start.clone())
    peak = max(loaded.peak or 0, platform.peak_resident() or 0) or None
    probe, bandwidths, samples = Probe(notice), [], []
    began = datetime.now(UTC)
    for repetition in range(repetitions):
        progress(test.name, repetition, repetitions)
        bandwidths.append(probe.measure(loaded.threads))
        samples.append(_play(model, test, ids, start.clone()))
    progress(test.name, repetitions, repetitions)
    # The probe's buffer is no part of what the model takes.
    del probe
    platform.reset_peak()
    speeds = [test.tokens / nanoseconds * 1e9 for nanoseconds in samples]
    return {
        **loaded.facts,
        "n_threads": loaded.threads,
        "n_prompt": test.prompt,
        "n_gen": test.generated,
        "n_depth": test.depth,
        "test_time": began.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(mean(samples)),
        "stddev_ns": round(stdev(samples)) if repetitions > 1 else 0,
        "avg_ts": mean(speeds),
        "stddev_ts": stdev(speeds) if repetitions > 1 else 0.0,
        **_own(loaded, test, median(bandwidths), mean(speeds), peak),
        "samples_ns": samples,
        "samples_ts": speeds,
    }


def _own(
    loaded: Loaded, test: Test, bandwidth: float, speed: float, peak: int | None
) -> dict[str, Any]:
    """What llama-bench does not tell. A prompt's tokens share the weights: no bytes for it."""
    layout = loaded.model.layout
    moved = moved_bytes(loaded.model, test.depth + test.generated // 2) if test.generated else None
    return {
        "moved_bytes_per_token": moved,
        "bandwidth_gbs": bandwidth / 1e9,
        "bandwidth_share": moved * speed / bandwidth if moved else None,
        "first_token_ms": loaded.first_token_ms,
        "jit_ms": loaded.jit_ms,
        "peak_rss": peak,
        "state_type": layout.state_type,
        "state_bytes": layout.fixed_bytes,
        "state_bytes_per_token": layout.bytes_per_token,
    }


def _play(model: Model, test: Test, ids: np.ndarray, state: State) -> int:
    """Nanoseconds of one repetition."""
    began = time.perf_counter_ns()
    if test.prompt:
        model.forward(ids, state)
    else:
        for token in ids:
            model.forward([token], state)
    return time.perf_counter_ns() - began
