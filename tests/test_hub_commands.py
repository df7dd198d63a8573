"""Pulling from the command line: what is printed, interruptions, and several processes at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from hubserver import CHECKPOINT, GGUF, LARGE, HubServer, commit, pulled
from keelback.convert.store import Store


def keelback(*arguments: str, **options) -> subprocess.CompletedProcess:
    options = {"input": "", "capture_output": True, "text": True, "timeout": 60, **options}
    return subprocess.run([sys.executable, "-m", "keelback.cli", *arguments], **options)


def test_run_pulls_a_model_once_and_needs_no_hub_afterwards(server: HubServer):
    arguments = ("run", "-hf", f"{CHECKPOINT}:Q8_0", "3 14 15", "-n", "3", "--temp", "0")
    first = keelback(*arguments)
    assert first.returncode == 0 and len(first.stdout.split()) == 3
    server.close()
    listed = json.loads(keelback("ls", "--json").stdout)
    assert [(row["name"], row["type"]) for row in listed] == [(f"{CHECKPOINT}:Q8_0", "Q8_0")]
    assert listed[0]["revision"] == commit(server.repos[CHECKPOINT])
    assert keelback(*arguments).stdout == first.stdout
    assert keelback("rm", CHECKPOINT).stdout == f"removed {CHECKPOINT}:Q8_0\n"
    gone = keelback(*arguments, "--offline")
    assert gone.returncode == 1 and gone.stderr.startswith("Error: ") and not gone.stdout


def test_pull_prints_the_path_and_nothing_else(server: HubServer):
    done = keelback("pull", GGUF)
    assert done.returncode == 0 and Path(done.stdout.strip()).name == "mamba-Q8_0.gguf"
    assert keelback("ls").stdout.rstrip().endswith(f"  {done.stdout.strip()}")
    assert json.loads(keelback("info", done.stdout.strip(), "--json").stdout)["file_bytes"]
    failed = keelback("pull", "user/none")
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1 and not failed.stdout


BAD = {
    "a model twice": (("run", "-hf", GGUF, "-m", "demo", "a"), 2, "given twice"),
    "a file of no repository": (("run", "-hff", "x.gguf", "a"), 2, "--hf-repo names none"),
    "a malformed name": (("run", "-hf", "../x", "a"), 1, "USER/MODEL"),
    "no prompt": (("run", "-hf", GGUF), 1, "the prompt is empty"),
    "rm of a path": (("rm", "./model.gguf"), 1, "nothing has been pulled yet"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_no_request(server: HubServer, case: str):
    arguments, status, said = BAD[case]
    done = keelback(*arguments)
    assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
    assert server.requests == []


def started(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "keelback.cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_pull_goes_on_from_there(server: HubServer, number: int):
    server.faults[LARGE] = ["slow"]
    process = started("pull", CHECKPOINT)
    partial = Store().downloads(CHECKPOINT)
    size = len(server.repos[CHECKPOINT][LARGE])
    while not any(path.stat().st_size for path in partial.glob(f"sha256-*-{LARGE}.partial")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "goes on from here" in said
        assert len(said.splitlines()) == 1
    assert keelback("ls").stdout.startswith(f"{CHECKPOINT} (unfinished)")
    server.requests.clear()
    pulled(CHECKPOINT)
    assert server.requests[-1][1]["range"] == f"bytes={size // 2}-"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_file_that_cannot_grow_gets_a_sentence_and_can_be_gone_on_with(server: HubServer):
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    assert len(server.repos[GGUF]["mamba-Q8_0.gguf"]) > 50_000
    done = keelback("pull", GGUF, preexec_fn=limit)
    assert done.returncode == 1 and "cannot be written: File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and Store().present() == []
    assert pulled(GGUF).read_bytes() == server.repos[GGUF]["mamba-Q8_0.gguf"]
    assert server.requests[-1][1]["range"].startswith("bytes=")


def test_two_processes_pull_a_model_once(server: HubServer):
    both = [started("run", "-hf", CHECKPOINT, "-p", "1", "-n", "1") for _ in range(2)]
    results = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert sorted(server.downloads()) == ["config.json", LARGE]


def test_nothing_but_a_pull_imports_huggingface_hub():
    lines = "import sys, keelback.cli, keelback.convert.pull, keelback.convert.store"
    check = f"{lines}\nprint('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_converting_needs_no_huggingface_hub(tmp_path: Path):
    folder = tiny.write_checkpoint("mamba-tied", tmp_path / "m")
    lines = (
        "import sys; sys.modules['huggingface_hub'] = None; from keelback.convert import convert"
    )
    check = f"{lines}; print(convert({str(folder)!r}, {str(tmp_path / 'm.gguf')!r}))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'm.gguf'}\n"
