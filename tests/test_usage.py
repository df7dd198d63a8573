"""What the command line refuses, before anything is opened, as no usage of it: the status is 2."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from keelback import models
from keelback.cli import main


def refusal(*arguments: str) -> str:
    """The sentence that arguments are refused with."""
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2 and done.output.startswith("Usage: "), done.output
    return done.output.splitlines()[-1]


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


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("run demo a -ngl 99", "-ngl"),
        ("run -p -st -no-cnv", "-no-cnv"),
        ("run -n5 -t1 -fa", "-fa"),
        ("run -p -ngl -mu=x", "-mu"),
        ("bench demo -pg 8,8", "-pg"),
        ("gguf dump demo -json", "-json"),
    ],
)
def test_a_long_option_of_one_dash_is_not_cut_into_short_ones(line, unknown):
    said = refusal(*line.split())
    assert said.startswith("Error: No such option") and re.findall(r"-[\w-]+", said) == [unknown]


def test_a_value_may_follow_a_short_option_at_once_and_may_look_like_one():
    for line in ("run demo -n1 --temp 0 -p -ngl", "run -ctk f32 -n 1 --temp 0 -- demo -ngl"):
        done = CliRunner().invoke(main, line.split())
        assert done.exit_code == 0 and "prompt 5 tokens, " in done.output
