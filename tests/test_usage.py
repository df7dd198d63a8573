"""What the command line refuses, before anything is opened, as no usage of it: the status is 2."""

from __future__ import annotations

import re
from importlib import metadata
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


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("run demo a -t 0", "--threads"),
        ("run demo a -c -5", "--ctx-size"),
        ("run demo a -n -2", "--predict"),
        ("run demo a -s -5", "--seed"),
        ("run demo a -s 18446744073709551616", "--seed"),
        ("run demo a --temp -1", "--temp"),
        ("run demo a --temp nan", "--temp"),
        ("run demo a --top-k -1", "--top-k"),
        ("run demo a --top-k 2.5", "--top-k"),
        ("run demo a --repeat-last-n -1", "--repeat-last-n"),
        ("run demo a --max-ram 1X", "--max-ram"),
        ("run demo a --logit-bias x", "--logit-bias"),
        ("run demo a --logit-bias 5", "--logit-bias"),
        ("run demo a --logit-bias -5", "--logit-bias"),
        ("run demo a --logit-bias 5.5", "--logit-bias"),
        ("run demo a --logit-bias 5+", "--logit-bias"),
        ("run demo a --chat-template {{1}} --chat-template-file x", "chat template"),
        ("bench demo -r 0", "--repetitions"),
        ("bench demo -t 1,0", "--threads"),
        ("bench demo -n -5", "--n-gen"),
        ("plan demo -np 0", "--parallel"),
        ("plan demo -c 0", "--ctx-size"),
        ("plan demo -t 0", "--threads"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_option(line, option):
    assert option in refusal(*line.split())


@pytest.mark.parametrize(
    ("bias", "text"), [("265+1e+2", " the\n"), ("265+100", " the\n"), ("265-1e-5", "\n\n")]
)
def test_a_bias_may_have_an_exponent_with_a_sign(bias, text):
    line = ("run", "demo", "It was the", "-n", "1", "--temp", "0", "--logit-bias", bias)
    assert CliRunner().invoke(main, line).stdout == text


@pytest.mark.parametrize("option", ["--offline", "--hf-token x", "--hf-file x"])
def test_what_is_said_of_a_repository_needs_one(option):
    assert option.split()[0] in refusal("run", "demo", "a", *option.split())


@pytest.mark.parametrize("command", ["run", "plan", "perplexity", "imatrix", "drift", "convert"])
def test_the_help_tells_defaults_as_defaults(command):
    page = " ".join(CliRunner().invoke(main, [command, "--help"]).stdout.split())
    assert "efault: " in page and not re.search(r"without[.:]", page)


def test_the_help_tells_how_far_a_run_goes():
    page = " ".join(CliRunner().invoke(main, ["run", "--help"]).stdout.split())
    assert "[default: -1; x>=-1]" in page and "[default: 0; x>=0]" in page


def test_sources_that_are_not_installed_have_no_version(monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    for found, said in ((lambda name: "1.2.3", "1.2.3"), (missing, "unknown (not installed)")):
        monkeypatch.setattr(metadata, "version", found)
        done = CliRunner().invoke(main, ["--version"])
        assert done.exit_code == 0 and done.output == f"keelback, version {said}\n"
