"""One process that fuzzes: started by fuzz.py, it prints a line of JSON for every input.

python tests/fuzz/worker.py FOLDER TARGET SEED FIRST COUNT STEP      inputs FIRST, FIRST + STEP, ...
python tests/fuzz/worker.py FOLDER TARGET --files FILE...            inputs that were kept
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random

from keelback.kernels.errors import KeelbackError
from targets import TARGETS, Target

#: Seconds an input may take, and bytes of memory the process may have.
SECONDS = 10
MEMORY = 2 << 30


class Hang(BaseException):
    """Raised by the alarm; no reader may take it for an error of the input."""


def main() -> None:
    """Read inputs until there are no more, or one ends the process."""
    folder, name, *rest = sys.argv[1:]
    path = Path(folder) / "input"
    target = TARGETS[name](Path(folder))
    bounded()
    for content in inputs(target, name, rest):
        # What ends this process can be found there.
        path.write_bytes(content)
        end, said = outcome(target, path)
        kept = path.with_name(hashlib.sha256(content).hexdigest()[:16])
        if end == "found":
            kept.write_bytes(content)
        print(json.dumps([end, said, kept.name]), flush=True)


def inputs(target: Target, name: str, rest: list[str]) -> Iterator[bytes]:
    if rest[0] == "--files":
        yield from (Path(file).read_bytes() for file in rest[1:])
        return
    seed, first, count, step = map(int, rest)
    for index in range(first, count, step):
        yield target.mutated(Random(f"{name}/{seed}/{index}"))


def outcome(target: Target, path: Path) -> tuple[str, str]:
    """What became of an input: "taken", "refused", or "found", and what was said."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            signal.alarm(SECONDS)
            target.run(path)
            return "taken", ""
    except KeelbackError as error:
        if len(sentence := str(error)) > 2000 or not sentence.isprintable():
            return "found", f"a long or unprintable message: {sentence[:99]!r}"
        return "refused", sentence
    except BaseException as error:
        signal.alarm(0)
        last = traceback.extract_tb(error.__traceback__)[-6:]
        where = " < ".join(f"{Path(at.filename).name}:{at.lineno}" for at in reversed(last))
        return "found", f"{type(error).__name__}: {str(error)[:300]} at {where}"
    finally:
        signal.alarm(0)


def bounded() -> None:
    """Let an input that takes too much time or memory fail in here."""

    def ring(*_: object) -> None:
        raise Hang(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, ring)
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
