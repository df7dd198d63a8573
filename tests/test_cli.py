"""The command line as a user meets it: in a process of its own, through pipes and signals."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

import tiny
from keelback import models

PROMPT = "It was the"


def keelback(*arguments: str, **options) -> subprocess.CompletedProcess:
    options = {"input": "", "capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run([sys.executable, "-m", "keelback.cli", *arguments], **options)


def test_run_writes_text_and_a_timing_line():
    done = keelback("run", "demo", PROMPT, "-n", "12", "--temp", "0", "-t", "1")
    assert done.returncode == 0
    assert done.stdout == "\ncommonwealth of the United States.\n"
    line = done.stderr.strip().splitlines()[-1]
    for part in (
        "load ",
        "prompt 4 tokens",
        "generated 12 tokens",
        "state 365.00 KiB fixed + 0 B per token",
    ):
        assert part in line


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_the_prompt_comes_from_options_files_and_pipes(tmp_path: Path, backend):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    end = ("-n", "5", "--temp", "0", "--backend", backend)
    texts = {
        keelback("run", "-p", PROMPT, *end).stdout,
        keelback("run", "-m", "demo", "-f", str(file), *end).stdout,
        keelback("run", *end, input=PROMPT).stdout,
        keelback("run", "-f", "-", *end, input=PROMPT).stdout,
    }
    assert texts == {"\ncommon\n"}


def test_a_seed_makes_a_run_repeatable():
    def text(seed: str) -> str:
        return keelback("run", "demo", PROMPT, "-n", "20", "-s", seed).stdout

    assert text("1") == text("1") != text("2")


def test_a_stop_string_and_a_logit_bias_are_heeded():
    done = keelback("run", "demo", PROMPT, "--temp", "0", "-r", " of the", "-n", "50")
    assert done.stdout == "\ncommonwealth\n"
    done = keelback("run", "demo", PROMPT, "--temp", "0", "-n", "2", "--logit-bias", "265+100")
    assert done.stdout == " the the\n"


def test_a_state_is_saved_and_gone_on_from(tmp_path: Path):
    state = str(tmp_path / "half.safetensors")
    sampling = ("-s", "5", "--repeat-penalty", "1.1")
    whole = keelback("run", "demo", PROMPT, "-n", "30", *sampling).stdout
    first = keelback("run", "demo", PROMPT, "-n", "12", *sampling, "--state-out", state).stdout
    rest = keelback("run", "--state-in", state, "-n", "18").stdout
    assert first[:-1] + rest[:-1] == whole[:-1]


def test_info_tells_what_a_file_holds():
    facts = json.loads(keelback("info", "--json").stdout)
    assert facts["architecture"] == "gated-deltanet" and facts["parameters"] == 4_681_832
    assert facts["state_bytes"] == {"fixed": 373_760, "per_token": 0}
    assert facts["tokenizer"] == {"model": "llama", "pre": "default", "tokens": 2048}
    assert {"name": "blk.0.ssm_a", "type": "F32", "shape": [4], "bytes": 16} in facts["tensors"]
    shown = keelback("info", "demo").stdout
    assert "gated-deltanet" in shown and "blk.0.ssm_a" in shown
    assert re.search("^chat template +no$", shown, re.MULTILINE)


def test_tokenize_shows_ids_and_pieces():
    assert json.loads(keelback("tokenize", "demo", PROMPT, "--ids").stdout) == [1, 610, 373, 265]
    pieces = json.loads(keelback("tokenize", "-p", PROMPT, "--json").stdout)
    assert [entry["piece"] for entry in pieces][1:] == [" It", " was", " the"]
    assert len(keelback("tokenize", "-p", PROMPT).stdout.splitlines()) == 4
    # A character that is no token comes as its bytes.
    lines = keelback("tokenize", "-p", "日").stdout.splitlines()
    assert [line.split()[1] for line in lines[-3:]] == [r"'\xe6'", r"'\x97'", r"'\xa5'"]


def test_convert_writes_a_file_that_runs_on_ids(tmp_path: Path):
    folder = tiny.write_checkpoint("mamba-q8", tmp_path / "mamba-q8")
    done = keelback("convert", str(folder), "--outtype", "q8_0", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("mamba-q8-Q8_0.gguf: ")
    assert "no tokenizer" in done.stderr
    model = str(tmp_path / "mamba-q8-Q8_0.gguf")
    done = keelback("run", model, "3 14 15", "-n", "2", "--temp", "0")
    assert done.returncode == 0 and len(done.stdout.split()) == 2
    done = keelback("run", model, "text", "-n", "2")
    assert done.returncode == 1 and "tokenizer" in done.stderr and "Traceback" not in done.stderr


TURN = "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ mark }} {{ m.content }}\n{% endfor %}"
GREEDY = ("-n", "8", "--temp", "0")
DEEP = '{"a": ' + "[" * 800 + "]" * 800 + "}"


def test_a_single_turn_is_the_prompt_by_a_template(tmp_path: Path):
    file = tmp_path / "turn.jinja"
    file.write_text(TURN)
    turn = ("-sys", "Be brief.", "--chat-template-kwargs", '{"mark": ":"}')
    text = "{{ bos_token }}system: Be brief.\nuser: Who is he?\n{{ '' }}"
    wanted = keelback("run", "-p", "x", "--chat-template", text, *GREEDY).stdout
    assert wanted != keelback("run", "-p", "Who is he?", *GREEDY).stdout
    for given in (("--chat-template", TURN), ("--chat-template-file", str(file))):
        assert keelback("run", "-st", "-p", "Who is he?", *turn, *given, *GREEDY).stdout == wanted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-st",), "holds no chat template"),
        (("-sys", "x"), "holds no chat template"),
        (("--chat-template", "chatml"), "names of llama.cpp's templates are not known"),
        (("--chat-template-file", "nowhere"), "nowhere cannot be read"),
        (("--chat-template", "{{ x.y.z }}"), "--chat-template cannot be used"),
        (("--chat-template", "{{ 1 }}", "--chat-template-kwargs", "[]"), "is no JSON object"),
        (("--chat-template", "{{ raise_exception('no') }}"), "refuses these messages: no"),
        (("--chat-template", "{{ none_such }}"), "--chat-template makes an empty prompt"),
        (("--chat-template", "{{ 1 }}", "--chat-template-kwargs", DEEP), "nested too deeply"),
        (("--chat-template-file", "/dev/zero"), "/dev/zero holds no Jinja template"),
    ],
)
def test_what_cannot_be_a_turn_gets_a_sentence(tmp_path: Path, arguments, said: str):
    done = keelback("run", "demo", "Who?", "-n", "1", *arguments, cwd=tmp_path)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_a_saved_state_does_not_start_a_turn(tmp_path: Path):
    state = str(tmp_path / "s")
    keelback("run", "demo", "Who?", "-n", "1", "--state-out", state)
    done = keelback("run", "demo", "Who?", "-n", "1", "--state-in", state, "-st")
    assert done.returncode == 1 and "leave -st" in done.stderr


def test_a_files_names_cannot_steer_the_terminal(tmp_path: Path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "toy")
    writer.add_name("\x1b]0;owned\x07" + "x" * 100_000)
    writer.add_tensor("a\x1b[2J", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused = keelback("info", str(path))
    assert "a name that can be none, 'a\\x1b[2J'" in refused.stderr
    path.write_bytes(path.read_bytes().replace(b"\x1b[2J", b"_[2J"))
    shown = keelback("info", str(path))
    assert shown.returncode == 0 and "owned" in shown.stdout and len(shown.stdout) < 2000
    assert "\x1b" not in shown.stdout + refused.stderr


def test_a_files_own_name_cannot_steer_the_terminal_either(tmp_path: Path):
    path = tmp_path / "\x1b]0;owned\x07.gguf"
    path.write_bytes(models.DEMO.read_bytes())
    for command in ("info", "plan", "gguf dump", "gguf check"):
        done = keelback(*command.split(), str(path))
        assert done.returncode == 0 and "owned" in done.stdout and "\x1b" not in done.stdout
    done = keelback("gguf", "split", str(path), str(tmp_path / "\x1b]0;part"))
    assert done.returncode == 0 and "part" in done.stdout and "\x1b" not in done.stdout


BAD = {
    "no such model": (("run", "nowhere.gguf", "text"), 1, "there is no such model file"),
    "an empty prompt": (("run", "demo", ""), 1, "the prompt is empty"),
    "an empty pipe": (("run", "demo"), 1, "the prompt is empty"),
    "a prompt twice": (("run", "demo", "a", "-p", "b"), 2, "given twice"),
    "a model twice": (("run", "demo", "a", "-m", "demo"), 2, "given twice"),
    "an unknown option": (("run", "--frobnicate"), 2, "No such option"),
    "an unknown command": (("frobnicate",), 2, "No such command"),
    "a text for a number": (("run", "demo", "a", "-n", "many"), 2, "not a valid integer"),
    "too many threads": (("run", "demo", "a", "-t", "9999"), 1, "9999 threads"),
    "a bias out of range": (("run", "demo", "a", "--logit-bias", "99999+1"), 1, "id 99999"),
    "a missing prompt file": (("run", "demo", "-f", "nowhere.txt"), 1, "cannot be read"),
    "a missing state": (("run", "--state-in", "nowhere"), 1, "there is no such file"),
    "no checkpoint": (("convert", "nowhere"), 1, "is no folder"),
    "an unknown type": (("convert", ".", "--outtype", "q9"), 2, "'q9'"),
    "a file that is no model": (("info", __file__), 1, "is not a GGUF file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_a_status(tmp_path: Path, case: str):
    arguments, status, said = BAD[case]
    done = keelback(*arguments, cwd=tmp_path)
    assert done.returncode == status
    assert said in done.stderr and "Traceback" not in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path):
    folder = tiny.write_checkpoint("mamba-tied", tmp_path / "c")
    done = keelback("convert", str(folder), "-o", str(tmp_path / "missing" / "out.gguf"))
    assert done.returncode == 1 and "cannot be written" in done.stderr
    done = keelback("run", "demo", "a", "-n", "1", "--state-out", str(tmp_path / "missing" / "s"))
    assert done.returncode == 1 and "cannot be written" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        f"run demo {PROMPT!r} -n 4000",
        # While a file is being written, which is not at fault.
        "perplexity demo -f text -c 8 --kl-divergence-base base",
    ],
)
def test_a_reader_that_leaves_early_is_no_error_message(tmp_path: Path, arguments: str):
    (tmp_path / "text").write_text("It was the best of times. " * 100)
    command = f"{sys.executable} -m keelback.cli {arguments} | head -c 20"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert len(done.stdout) == 20 and "Traceback" not in done.stderr and "Error" not in done.stderr
    assert os.listdir(tmp_path) == ["text"]


def interrupted(
    arguments: list[str], after: float, tmp_path: Path, ready: bytes = b""
) -> tuple[int, bytes, float]:
    """Start on a terminal of its own, press Ctrl-C, and return status, output and the delay."""
    master, slave = pty.openpty()
    started = subprocess.Popen(
        [sys.executable, "-m", "keelback.cli", *arguments],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=tmp_path,
    )  # fmt: skip
    os.close(slave)
    output = b""
    while ready and ready not in output:
        output += os.read(master, 4096)
    time.sleep(after)
    pressed = time.monotonic()
    started.send_signal(signal.SIGINT)
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:
            break
        if not chunk:
            break
        output += chunk
    status = started.wait(timeout=30)
    os.close(master)
    return status, output, time.monotonic() - pressed


def test_ctrl_c_stops_while_writing_and_saves_the_state(tmp_path: Path):
    arguments = ["run", "demo", PROMPT, "-n", "-1", "--ignore-eos", "--state-out", "s"]
    status, output, _ = interrupted(arguments, 0.3, tmp_path, ready=b"\n")
    assert status == 130 and b"Traceback" not in output and b"generated" in output
    assert keelback("run", "--state-in", "s", "-n", "3", cwd=tmp_path).returncode == 0


def test_ctrl_c_stops_in_the_middle_of_a_long_prompt(tmp_path: Path):
    (tmp_path / "long.txt").write_text("It was the best of times. " * 40_000)
    arguments = ["run", "demo", "-f", "long.txt", "-n", "5", "-t", "1"]
    status, output, delay = interrupted(arguments, 0.5, tmp_path, ready=b"reading")
    assert status == 130 and b"Traceback" not in output and b"generated 0 tokens" in output
    assert delay < 10


def test_ctrl_c_ends_the_start_without_a_traceback(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Press:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press())\n"
    )
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "keelback", "run", "demo", PROMPT],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 130 and not done.stderr


def test_a_process_waits_for_what_is_made_beside_it():
    lines = "import time\nfrom keelback.engine.threads import Early\n"
    lines += "Early(lambda: (time.sleep(0.3), print('made')))"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=60)
    assert done.stdout == "made\n"
