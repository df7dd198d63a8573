"""Engines as processes that are told what to do, and the statistics of what they answer."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

PLAYERS = Path(__file__).with_name("players.py")
#: Threads of an engine may spin for a moment after their work; they are not to disturb the next.
PAUSE = 0.03


class Unable(Exception):
    """An engine cannot run a model."""


class Engine:
    """A process of `players.py`."""

    def __init__(
        self, name: str, model: str | Path, threads: int, python: str = "", context: int = 4096
    ) -> None:
        self.name = name
        program = [python or sys.executable, str(PLAYERS)]
        self._process = subprocess.Popen(
            [*program, name, str(model), str(threads), str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = json.loads(line) if line else {"error": "it ended without an answer"}
        if "error" in found:
            self.close()
            raise Unable(f"{self.name}: {found['error']}")
        return found

    def do(self, job: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self._process.stdin is not None
        time.sleep(PAUSE)
        self._process.stdin.write(json.dumps({"do": job, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def prefill(self, count: int) -> float:
        """Read `count` tokens from the beginning; seconds."""
        self.do("start")
        return self.do("prefill", tokens=count)["seconds"]

    def decode(self, count: int) -> float:
        """Read `count` tokens one by one; seconds."""
        return self.do("decode", tokens=count)["seconds"]

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(timeout=60)


@contextmanager
def engines(
    names: Sequence[str],
    model: str | Path,
    threads: int,
    pythons: dict[str, str],
    checkpoint: str | None = None,
    context: int = 4096,
) -> Iterator[tuple[list[Engine], list[str]]]:
    """The engines that can run a model, and sentences about those that cannot.

    pythons: where an engine lives, if not here. checkpoint: a folder for transformers to run.
    """
    wanted = [(name, str(model)) for name in names]
    wanted += [("transformers", checkpoint)] if checkpoint else []
    with ExitStack() as stack:
        running, remarks = [], []
        for name, path in wanted:
            try:
                engine = Engine(name, path, threads, pythons.get(name, ""), context)
            except Unable as error:
                remarks.append(str(error))
                continue
            stack.callback(engine.close)
            running.append(engine)
        yield running, remarks


def installed_peers() -> list[str]:
    """Peers that can be measured here; llama-bench only where llama.cpp's package is missing."""
    found = [
        name for name in ("llama_cpp", "ik_llama_cpp") if importlib.util.find_spec(name) is not None
    ]
    if "llama_cpp" not in found and shutil.which("llama-bench"):
        found.append("llama-bench")
    return found


def interval(values: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """A 95 % confidence interval of the median, by drawing from the values again and again."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], medians[int(0.975 * rounds)]
