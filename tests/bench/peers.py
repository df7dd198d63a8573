"""keelback beside its peers: the same file, the same threads, turn by turn.

    python tests/bench/peers.py [speed|formats|start|memory|depth|long|states|busy|help|all] [...]

`speed` (the default) alternates bursts of prefill and decode between keelback and every peer that
is installed, and probes the memory's read bandwidth beside them; compare the ratios and the shares
of the bandwidth, for the bare figures move with the machine. `formats.py` and `processes.py`
describe the others. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import formats
import processes
from driver import Engine, engines, installed_peers
from modelfiles import MODELS, TYPES, model_file, models

#: Tokens decoded at once: few, so that both engines meet the same phase of the machine.
BURST = 32
HEADER = (
    f"{'model':12} {'type':7} {'t':>2} {'engine':12} | {'decode':>7} {'ratio':>6} {'share':>6} | "
    f"{'prefill':>8} {'ratio':>6} | {'GB/s':>5} {'MB/token':>8}"
)


def main() -> None:
    options = arguments()
    report: dict[str, Any] = {"machine": machine(options)}
    for name, value in report["machine"].items():
        options.say(f"{name}: {value}")
    for name in MEASUREMENTS if options.what == "all" else [options.what]:
        options.say(f"\n{name}")
        report[name] = MEASUREMENTS[name](options)
    print(json.dumps(report))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", nargs="?", default="speed", choices=[*MEASUREMENTS, "all"])
    listed: dict[str, Any] = {"type": lambda text: [part for part in text.split(",") if part]}
    names = f"of {', '.join(models())}; or GGUF files"
    parser.add_argument("--models", default=list(MODELS), help=names, **listed)
    parser.add_argument("--types", default=["q8_0"], help=f"of {', '.join(TYPES)}", **listed)
    parser.add_argument("--threads", default=["1", "2"], **listed)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prefill")
    parser.add_argument("--generate", type=int, default=64, help="tokens decoded after each")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--depth", type=int, default=50_000, help="tokens read before (depth)")
    parser.add_argument("--folder", type=Path, help="where model files are made and kept")
    parser.add_argument("--peers", default=installed_peers(), **listed)
    parser.add_argument("--transformers", metavar="FOLDER", help="run this checkpoint beside them")
    parser.add_argument(
        "--python", action="append", default=[], metavar="PEER=PROGRAM", help="what has a peer"
    )
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()
    options.pythons = dict(pair.split("=", 1) for pair in options.python)
    options.folder = options.folder or Path(tempfile.gettempdir()) / "keelback-bench"
    options.say = (lambda text: None) if options.json else (lambda text: print(text, flush=True))
    return options


def machine(options: argparse.Namespace) -> dict[str, str]:
    """What runs on what."""
    found = {"python": platform.python_version(), "processor": _processor()}
    for package in ("numba", "llama-cpp-python", "ik-llama-cpp-python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "peers": ", ".join(options.peers) or "none"}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def files(options: argparse.Namespace) -> Iterator[tuple[str, str, Path]]:
    """(model, type, file) of everything that was asked for."""
    for model in options.models:
        if model not in models():
            yield Path(model).stem, "", Path(model)
            continue
        for kind in options.types:
            yield model, kind, model_file(options.folder, model, kind)


@dataclass
class Times:
    """What one engine took, round by round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefill and decode of every file on every number of threads."""
    rows = []
    options.say(HEADER)
    for threads in map(int, options.threads):
        probe = Engine("probe", "", threads)
        for model, kind, path in files(options):
            for row in compare(path, threads, probe, options):
                rows.append({"model": model, "type": kind, "threads": threads, **row})
                options.say(line(rows[-1]))
        probe.close()
    return rows


def compare(
    path: Path, threads: int, probe: Engine, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row an engine: its own figures, and keelback's ratio to it."""
    names = ["keelback", *options.peers]
    with engines(names, path, threads, options.pythons, options.transformers) as (running, remarks):
        for remark in remarks:
            options.say(f"  {remark}")
        times = {engine.name: Times() for engine in running}
        for engine in running:
            engine.prefill(options.prompt)
            engine.decode(4)
        for _ in range(options.repeat):
            play(running, times, probe, options)
        moved = next(engine.facts["moved_bytes"] for engine in running if engine.name == names[0])
    for name, measured in times.items():
        yield summary(name, measured, times[names[0]], moved, options)


def play(
    running: list[Engine], times: dict[str, Times], probe: Engine, options: argparse.Namespace
) -> None:
    """One round: a prefill each, then decode in bursts, each engine in turn."""
    for engine in running:
        times[engine.name].prefill.append(engine.prefill(options.prompt))
    for _ in range(max(1, options.generate // BURST)):
        bandwidth = probe.do("probe")["bytes_per_second"]
        for engine in running:
            times[engine.name].decode.append(engine.decode(BURST))
            times[engine.name].bandwidth.append(bandwidth)


def summary(
    name: str, mine: Times, keelback: Times, moved: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Medians; ratios are medians of ratios of neighbours, keelback's speed over this engine's."""
    probed = list(zip(mine.bandwidth, mine.decode, strict=True))
    return {
        "engine": name,
        "decode_tokens_per_second": BURST / median(mine.decode),
        "decode_ratio": _ratio(mine.decode, keelback.decode),
        "bandwidth_share": median(moved * BURST / seconds / read for read, seconds in probed),
        "prefill_tokens_per_second": options.prompt / median(mine.prefill),
        "prefill_ratio": _ratio(mine.prefill, keelback.prefill),
        "probed_bytes_per_second": median(mine.bandwidth),
        "moved_bytes_per_token": moved,
        "decode_seconds": mine.decode,
        "prefill_seconds": mine.prefill,
    }


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return median(b / a for a, b in zip(ours, theirs, strict=True))


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    own = row["engine"] == "keelback"
    ratios = ["" if own else f"{row[name]:.2f}" for name in ("decode_ratio", "prefill_ratio")]
    return (
        f"{row['model']:12} {row['type']:7} {row['threads']:2} {row['engine']:12} | "
        f"{row['decode_tokens_per_second']:7.1f} {ratios[0]:>6} {row['bandwidth_share']:6.0%} | "
        f"{row['prefill_tokens_per_second']:8.1f} {ratios[1]:>6} | "
        f"{row['probed_bytes_per_second'] / 1e9:5.1f} {row['moved_bytes_per_token'] / 1e6:8.1f}"
    )


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "speed": speed,
    "formats": formats.formats,
    "start": lambda options: processes.start(options, files(options)),
    "memory": lambda options: processes.memory(options, files(options)),
    "depth": lambda options: processes.depth(options, files(options)),
    "long": lambda options: processes.long(options, files(options)),
    "states": lambda options: processes.states(options, files(options)),
    "busy": lambda options: processes.busy(options, files(options)),
    "help": processes.help_page,
}

if __name__ == "__main__":
    main()
