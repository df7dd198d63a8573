"""Compiling on several cores: helpers that help, fail, talk nonsense, and end with who asked."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from keelback.kernels import crew, jit
from keelback.kernels.objects import _load

KERNELS = [
    (name, f"keelback.kernels.{module}_cpu")
    for name, module in (
        ("post", "walk"), ("lead", "walk"), ("select", "embedding"), ("columns", "columns"),
        ("join", "columns"), ("add", "activation"), ("multiply", "activation"),
        ("softplus", "activation"), ("pack.q8_0", "pack"),
    )
]  # fmt: skip
#: What helpers may do instead of helping.
PROGRAMS = {
    "ends at once": "pass",
    "ends when it is asked": "input()",
    "says that there is nothing": "input(); import sys; sys.stdout.write('\\0' * 8)",
    "ends in the middle": "input(); import sys; sys.stdout.write('\\x09' + '\\0' * 7 + 'half')",
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started, on what seems to be a machine of three cores."""
    processes: list[subprocess.Popen[bytes]] = []
    start = crew._start

    def note() -> subprocess.Popen[bytes]:
        processes.append(start())
        return processes[-1]

    monkeypatch.setattr(crew, "_start", note)
    monkeypatch.setattr(crew, "processors", lambda: 3)
    return processes


def test_helpers_compile_kernels_that_load(started):
    found = dict(crew.compile_kernels(KERNELS))
    assert sorted(found) == sorted(KERNELS)
    assert all(_load(code) for code in found.values())
    assert len(started) == 2 and all(process.returncode is not None for process in started)


def test_a_helper_answers_with_object_code():
    process = crew._start()
    assert process.stdin is not None and process.stdout is not None
    code = crew._answer(process.stdin, process.stdout, KERNELS[0])
    assert code is not None and _load(code)
    assert crew._answer(process.stdin, process.stdout, ("no such", KERNELS[0][1])) is None
    process.communicate()
    assert process.returncode != 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_failing_helper_was_given_is_compiled_here(monkeypatch, program):
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", PROGRAMS[program]]
    monkeypatch.setattr(crew, "processors", lambda: 2)
    monkeypatch.setattr(
        crew, "_start", lambda: subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    )
    found = dict(crew.compile_kernels(KERNELS))
    assert sorted(found) == sorted(KERNELS) and all(found.values())


def test_where_no_process_can_be_started_all_is_compiled_here(monkeypatch):
    def start() -> subprocess.Popen[bytes]:
        raise PermissionError

    monkeypatch.setattr(crew, "processors", lambda: 4)
    monkeypatch.setattr(crew, "_start", start)
    assert sorted(dict(crew.compile_kernels(KERNELS))) == sorted(KERNELS)


def test_helpers_end_with_whoever_asked(started):
    asked = crew.compile_kernels(KERNELS)
    next(asked)
    asked.close()
    assert started and all(process.returncode is not None for process in started)


def test_a_few_kernels_are_compiled_without_helpers(started):
    assert len(dict(crew.compile_kernels(KERNELS[:3]))) == 3 and not started


def test_ctrl_c_waits_for_the_end_of_a_kernel_and_ends_the_helpers(monkeypatch, started):
    compiled = []

    def compile_kernel(*kernel: str) -> bytes:
        signal.raise_signal(signal.SIGINT)
        compiled.append(kernel)
        return b"code"

    monkeypatch.setattr(jit, "compile_kernel", compile_kernel)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        dict(crew.compile_kernels(KERNELS))
    assert len(compiled) == 1 and signal.getsignal(signal.SIGINT) is before
    assert started and all(process.returncode is not None for process in started)
