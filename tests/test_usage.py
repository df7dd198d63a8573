"""What the command line refuses, before anything is opened, as no usage of it: the status is 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from keelback import models
from keelback.cli import main


def refusal(*arguments: str) -> str:
    """The sentence that arguments are refused with."""
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2 and not done.stdout, done.output
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("run", "demo", "a", "--state-in", ""), "--state-in"),
        (("run", "demo", "a", "--stop", ""), "--stop"),
        (("run", "demo", "-f", ""), "--file"),
        (("run", "", "a"), "MODEL"),
        (("bench", "demo", ""), "MODEL"),
        (("convert", ""), "CHECKPOINT"),
        (("gguf", "dump", ""), "FILE"),
    ],
)
def test_an_empty_name_is_not_taken_for_none(arguments, named):
    said = refusal(*arguments)
    assert named in said and said.endswith("it is empty; fill it in or leave it out")


def test_a_text_may_be_empty(tmp_path: Path):
    path, state = tmp_path / "m.gguf", str(tmp_path / "s")
    path.write_bytes(models.DEMO.read_bytes())
    greedy = ("-n", "1", "--temp", "0")
    for arguments in (
        ("gguf", "set", str(path), "general.name", ""),
        ("run", "demo", "a", *greedy, "--state-out", state),
        ("run", "-p", "", *greedy, "--state-in", state),
    ):
        assert CliRunner().invoke(main, arguments).exit_code == 0
