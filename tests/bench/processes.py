"""What whole processes take: starting, memory, deep texts, types of states, a busy machine."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from driver import Engine, engines, interval

BURST = 32
Files = Iterable[tuple[str, str, Path]]
CLI = [sys.executable, "-m", "keelback.cli"]


def start(options: argparse.Namespace, files: Files) -> list[dict[str, Any]]:
    """Seconds of a whole process up to its first token: keelback warm, keelback cold, peers.

    A peer's process loads the file and reads the same three ids; its Python start counts as ours.
    Every process runs twice, and the second is timed: a virtual machine may give memory that was
    freed back to its host within a second, and getting it again takes longer than all the rest.
    """
    rows = []
    threads = options.threads[-1]
    for model, kind, path in files:
        # Files made here have no vocabulary: their prompt is ids.
        command = [*CLI, "run", str(path), "-p", "5 7 11", "-n", "1", "--temp", "0", "-t", threads]
        times: dict[str, list[float]] = {"keelback": []}
        cold = _cold(command, options.repeat)
        for _ in range(options.repeat):
            times["keelback"].append([_wall(command) for _ in range(2)][-1])
            for peer in options.peers:
                pair = [_first_token(peer, path, int(threads), options.pythons) for _ in range(2)]
                if pair[-1] is not None:
                    times.setdefault(peer, []).append(pair[-1])
        for name, seconds in times.items():
            row = {"model": model, "type": kind, "engine": name, "warm_seconds": median(seconds)}
            if name == "keelback":
                row["cold_seconds"] = cold
            rows.append(row)
            first = f", with an empty cache {cold:.2f} s" if name == "keelback" else ""
            options.say(f"{model:12} {kind:7} {name:12} {median(seconds):6.3f} s{first}")
    return rows


def _wall(command: list[str], **environment: str) -> float:
    began = time.perf_counter()
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, **environment},
    )
    return time.perf_counter() - began


def _cold(command: list[str], repeat: int) -> float:
    """With a cache that is empty every time."""
    times = []
    for _ in range(min(repeat, 3)):
        with tempfile.TemporaryDirectory() as folder:
            times.append(_wall(command, KEELBACK_CACHE=folder))
    return median(times)


def _first_token(peer: str, path: Path, threads: int, pythons: dict[str, str]) -> float | None:
    began = time.perf_counter()
    with engines([peer], path, threads, pythons) as (running, _):
        for engine in running:
            engine.prefill(3)
            return time.perf_counter() - began
    return None


def memory(options: argparse.Namespace, files: Files) -> list[dict[str, Any]]:
    """The peak of resident memory (VmHWM) in bytes after a prompt of 512 and 128 tokens more."""
    rows = []
    for model, kind, path in files:
        names = ["keelback", *options.peers]
        _peak("keelback", path, options)
        for name in names:
            peak = _peak(name, path, options)
            if peak is not None:
                rows.append({"model": model, "type": kind, "engine": name, "peak_bytes": peak})
                size = path.stat().st_size
                options.say(
                    f"{model:12} {kind:7} {name:12} {peak / 1e6:8.0f} MB, file {size / 1e6:.0f} MB"
                )
    return rows


def _peak(name: str, path: Path, options: argparse.Namespace) -> int | None:
    with engines([name], path, int(options.threads[-1]), options.pythons) as (running, _):
        for engine in running:
            engine.prefill(512)
            engine.decode(128)
            return engine.do("peak")["bytes"]
    return None


def depth(options: argparse.Namespace, files: Files) -> list[dict[str, Any]]:
    """Decode deep in a text against decode at its beginning, in turn, with an interval."""
    rows = []
    for model, kind, path in files:
        engine = Engine("keelback", path, int(options.threads[-1]))
        engine.do("start")
        engine.do("prefill", tokens=options.depth)
        engine.do("keep", state="deep")
        ratios = []
        for turn in range(max(8, 2 * options.repeat)):
            order = ("fresh", "deep") if turn % 2 else ("deep", "fresh")
            seconds = {name: _burst_from(engine, name) for name in order}
            ratios.append(seconds["fresh"] / seconds["deep"])
        engine.close()
        low, high = interval(ratios)
        rows.append(
            {"model": model, "type": kind, "depth": options.depth, "ratio": median(ratios),
             "low": low, "high": high, "ratios": ratios}
        )  # fmt: skip
        options.say(
            f"{model:12} {kind:7} speed at {options.depth} over speed at 0: "
            f"{median(ratios):.3f} (95 %: {low:.3f} to {high:.3f})"
        )
    return rows


def long(options: argparse.Namespace, files: Files) -> list[dict[str, Any]]:
    """Decode behind a long text, turn by turn with every peer, and what the text has taken."""
    rows = []
    room = options.depth + options.repeat * BURST + 64
    for model, kind, path in files:
        names = ["keelback", *options.peers]
        threads = int(options.threads[-1])
        with engines(names, path, threads, options.pythons, None, room) as (running, _):
            before = [engine.do("peak")["bytes"] for engine in running]
            read = [engine.prefill(options.depth) for engine in running]
            taken = [
                engine.do("peak")["bytes"] - first
                for engine, first in zip(running, before, strict=True)
            ]
            seconds = [[engine.decode(BURST) for engine in running] for _ in range(options.repeat)]
            for i, engine in enumerate(running):
                speed = BURST / median(turn[i] for turn in seconds)
                ratio = median(turn[i] / turn[0] for turn in seconds)
                rows.append(
                    {"model": model, "type": kind, "engine": engine.name, "depth": options.depth,
                     "tokens_per_second": speed, "ratio": ratio, "read_seconds": read[i],
                     "taken_bytes": taken[i],
                     "bytes_per_token": engine.facts.get("bytes_per_token")}
                )  # fmt: skip
                options.say(
                    f"{model:12} {kind:7} {engine.name:12} at {options.depth}: {speed:6.1f} "
                    f"tokens/s, ratio {ratio:.2f}, read in {read[i]:.0f} s, "
                    f"{taken[i] / 1e6:.0f} MB more"
                )
    return rows


def states(options: argparse.Namespace, files: Files) -> list[dict[str, Any]]:
    """Speed with states in BF16 and INT8 over speed with float32, turn by turn."""
    rows = []
    names = ["keelback", "keelback-bf16", "keelback-int8"]
    for model, kind, path in files:
        for threads in map(int, options.threads):
            with engines(names, path, threads, options.pythons) as (running, _):
                for engine in running:
                    engine.prefill(options.prompt)
                decode, prefill = _rounds(running, options)
                moved = [engine.facts["moved_bytes"] for engine in running]
            for i, name in enumerate(names):
                ratios = [turn[0] / turn[i] for turn in decode]
                low, high = interval(ratios)
                reading = median(turn[0] / turn[i] for turn in prefill)
                speed = BURST / median(turn[i] for turn in decode)
                rows.append(
                    {"model": model, "type": kind, "threads": threads, "engine": name,
                     "tokens_per_second": speed, "ratio": median(ratios), "low": low, "high": high,
                     "prefill_ratio": reading, "moved_bytes_per_token": moved[i]}
                )  # fmt: skip
                options.say(
                    f"{model:12} {kind:7} {threads:2} {name:13} {speed:6.1f} tokens/s, ratio "
                    f"{median(ratios):.3f} (95 %: {low:.3f} to {high:.3f}), prefill {reading:.2f}, "
                    f"{moved[i] / 1e6:.0f} MB a token"
                )
    return rows


def _rounds(
    running: list[Engine], options: argparse.Namespace
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of bursts of decode, and of prompts: a list a round, a number an engine."""
    decode, prefill = [], []
    for turn in range(max(8, 2 * options.repeat)):
        seconds = [0.0] * len(running)
        # Now in this order, now in the other one.
        for i in range(len(running))[:: 1 if turn % 2 else -1]:
            seconds[i] = _burst_from(running[i], "fresh")
        decode.append(seconds)
        if turn < options.repeat:
            prefill.append([engine.prefill(options.prompt) for engine in running])
    return decode, prefill


def _burst_from(engine: Engine, state: str) -> float:
    engine.do("start", state=state)
    engine.decode(2)
    return engine.decode(BURST)


def busy(options: argparse.Namespace, files: Files) -> list[dict[str, Any]]:
    """Decode while another process keeps one processor busy, against decode without it."""
    rows = []
    names = ["keelback", *options.peers]
    for model, kind, path in files:
        with (
            engines(names, path, int(options.threads[-1]), options.pythons) as (running, _),
            burner() as process,
        ):
            ratios: dict[str, list[float]] = {engine.name: [] for engine in running}
            speeds: dict[str, list[float]] = {engine.name: [] for engine in running}
            for _ in range(options.repeat):
                for engine in running:
                    alone = _burst_from(engine, "fresh")
                    process.send_signal(signal.SIGCONT)
                    beside = _burst_from(engine, "fresh")
                    process.send_signal(signal.SIGSTOP)
                    ratios[engine.name].append(alone / beside)
                    speeds[engine.name].append(BURST / beside)
        for name, values in ratios.items():
            kept, speed = median(values), median(speeds[name])
            rows.append({"model": model, "type": kind, "engine": name, "ratio": kept,
                         "tokens_per_second": speed})  # fmt: skip
            options.say(f"{model:12} {kind:7} {name:12} {kept:6.2f} of its speed, {speed:.1f}/s")
    return rows


@contextmanager
def burner() -> Iterator[subprocess.Popen]:
    """A process, stopped at first, that keeps the first processor busy."""
    script = (
        "import os\n"
        "if hasattr(os, 'sched_setaffinity'):\n"
        "    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "while True: pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def help_page(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of `keelback --help`, and of a Python that does nothing."""
    found = {
        "help_seconds": median(_wall([*CLI, "--help"]) for _ in range(options.repeat)),
        "python_seconds": median(
            _wall([sys.executable, "-c", "pass"]) for _ in range(options.repeat)
        ),
    }
    options.say(f"keelback --help {found['help_seconds']:.3f} s")
    options.say(f"python -c pass  {found['python_seconds']:.3f} s")
    return found
