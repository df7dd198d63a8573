"""Memory that does not grow with the text, and memory that there is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

import keelback
from keelback.engine import commands
from keelback.engine.platform import pages

STATUS = Path("/proc/self/statm")


@pytest.mark.skipif(not STATUS.exists(), reason="reads resident memory as Linux counts it")
def test_resident_memory_does_not_grow_with_the_text(tiny_model):
    session = keelback.Session(tiny_model("mamba-tied", "f32"), seed=1, ignore_eos=True)
    session.feed([1, 2, 3])
    resident = {}
    for count in range(1, 20_001):
        session.next_token()
        if count in (2_000, 20_000):
            resident[count] = int(STATUS.read_text().split()[1])
    assert session.state.position == 20_002
    assert resident[20_000] <= 1.01 * resident[2_000]


#: Runs a command, and tells on standard error what the process took at its peak.
MEASURED = """
import sys
from keelback.cli import main
from keelback.engine.platform import peak_resident
try:
    main()
finally:
    print(peak_resident(), file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what libraries take was measured on Linux")
def test_a_run_takes_at_its_peak_what_was_planned():
    def done(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", MEASURED, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    run = ("run", "demo", "It was the", "-n", "5")
    done(*run)  # compiles what has not been compiled yet
    peak = int(done(*run).stderr.splitlines()[-1])
    planned = json.loads(done("plan", "demo", "--json").stdout)["peak_bytes"]
    assert planned == pytest.approx(peak, rel=0.15)


def test_memory_that_there_is_not_gets_a_sentence():
    with pytest.raises(click.ClickException, match="not enough memory for this model"):
        commands.Commands(callback=lambda: pages(1 << 62), invoke_without_command=True).main(
            [], standalone_mode=False
        )
