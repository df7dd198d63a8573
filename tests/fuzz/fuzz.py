"""Fuzzing: damaged files are read in processes of their own, and every bad end is kept.

    python tests/fuzz/fuzz.py --target gguf --count 50000 --seed 1 --jobs 2

A crash, a hang, an exception other than KeelbackError, and memory beyond the limit are finds: the
input goes to corpus/TARGET/, which test_fuzz.py reads again for ever. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
CORPUS, WORKER = HERE / "corpus", HERE / "worker.py"
#: Seconds for a worker to say something: to start (and compile), and to read an input.
START, PATIENCE = 300, 20


@dataclass
class Report:
    """How many inputs were taken and refused, and what was found: (what was said, the input)."""

    ends: Counter[str] = field(default_factory=Counter)
    finds: list[tuple[str, bytes]] = field(default_factory=list)

    def distinct(self) -> dict[str, list[bytes]]:
        """Finds by the place where they happened, the smallest input first."""
        found: dict[str, list[bytes]] = {}
        for said, content in self.finds:
            kind, place = said.partition(": ")[0], said.rpartition(" at ")
            found.setdefault(f"{kind} at {place[2]}" if place[1] else kind, []).append(content)
        return {said: sorted(inputs, key=len) for said, inputs in found.items()}


def fuzz(target: str, count: int, seed: int = 0, jobs: int = 1) -> Report:
    """Read `count` damaged inputs of a target in `jobs` processes."""
    report = Report()

    def job(first: int) -> None:
        while first < count:
            numbers = [str(number) for number in (seed, first, count, jobs)]
            done = _work(target, numbers, report)
            if done is None:
                return
            first += (done + 1) * jobs

    with ThreadPoolExecutor(jobs) as threads:
        list(threads.map(job, range(jobs)))
    return report


def replay(target: str, files: Sequence[Path]) -> Report:
    """Read inputs that were kept."""
    report, left = Report(), list(files)
    while left:
        done = _work(target, ["--files", *map(str, left)], report)
        left = [] if done is None else left[done + 1 :]
    return report


def _work(target: str, arguments: list[str], report: Report) -> int | None:
    """Run one worker. Returns how many inputs it read before one ended it, None where none did."""
    with tempfile.TemporaryDirectory(prefix="keelback-fuzz-") as folder:
        command = [sys.executable, str(WORKER), folder, target, *arguments]
        # The worker makes its seeds with what tests use.
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done, written, errors = 0, Path(folder) / "input", Path(folder) / "errors"
        with (
            errors.open("wb") as stderr,
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=stderr
            ) as worker,
        ):
            for line in _lines(worker):
                end, said, name = json.loads(line)
                done += 1
                report.ends[end] += 1
                if end == "found":
                    report.finds.append((said, Path(folder, name).read_bytes()))
        if worker.returncode == 0:
            return None
        if not written.exists():
            words = errors.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the worker for {target} did not start: {words}")
        report.ends["found"] += 1
        report.finds.append(
            (f"status {worker.returncode}: the process ended", written.read_bytes())
        )
        return done


def _lines(worker: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """What a worker says, until it ends or says nothing for too long."""
    assert worker.stdout is not None
    patience, rest = START, b""
    while True:
        if not select.select([worker.stdout], [], [], patience)[0]:
            worker.kill()
            return
        chunk = os.read(worker.stdout.fileno(), 1 << 16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        patience = PATIENCE


def keep(target: str, report: Report) -> list[Path]:
    """Put the smallest input of every distinct find into the corpus."""
    kept = []
    for inputs in report.distinct().values():
        name = hashlib.sha256(inputs[0]).hexdigest()[:16]
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        (CORPUS / target / name).write_bytes(inputs[0])
        kept.append(CORPUS / target / name)
    return kept


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    report = fuzz(given.target, given.count, given.seed, given.jobs)
    kept = keep(given.target, report)
    for said, inputs in report.distinct().items():
        print(f"{len(inputs):6}  {said}")
    print(json.dumps({**report.ends, "target": given.target, "kept": [path.name for path in kept]}))
    sys.exit(bool(kept))


if __name__ == "__main__":
    main()
