"""The folder of compiled kernels: shared by processes, killed writers, folders that fail."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keelback.engine.cpu import CpuBackend
from keelback.kernels import cache
from keelback.kernels.cache import KEPT_FOLDERS, ObjectFolder
from keelback.kernels.files import try_lock
from keelback.kernels.jit import all_kernels
from keelback.kernels.objects import key

# Two small kernels, so that compiling takes a moment only.
COMPILE = """
import sys
from keelback.kernels.objects import addresses
names = [("post", "keelback.kernels.walk_cpu"), ("select", "keelback.kernels.embedding_cpu")]
steps = []
found = addresses(names, lambda text: print(text), lambda *step: steps.append(step))
print(steps, len(set(found.values())))
"""
STEPS = "[(0, 2), (1, 2), (2, 2)] 2\n"


def start(script: str, folder: Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "KEELBACK_CACHE": str(folder)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script]
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, **options
    )


def output(started: subprocess.Popen) -> str:
    out, errors = started.communicate(timeout=120)
    assert started.returncode == 0, errors
    return out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectFolder:
    monkeypatch.setenv("KEELBACK_CACHE", str(tmp_path))
    return ObjectFolder("0" * 24)


def test_of_two_that_start_on_an_empty_folder_one_compiles(tmp_path: Path):
    both = [start(COMPILE, tmp_path) for _ in range(2)]
    first, second = sorted((output(process) for process in both), key=len, reverse=True)
    assert first.startswith("compiling 2 kernels") and first.endswith(STEPS)
    assert second in ("[] 2\n", "waiting for another keelback to compile the kernels\n[] 2\n")
    assert output(start(COMPILE, tmp_path)) == "[] 2\n"


def test_a_killed_writer_blocks_nobody_and_what_it_left_is_removed(tmp_path: Path):
    writer = start(
        "import time\n"
        "from keelback.kernels.objects import _folder\n"
        "with _folder().writing(lambda: None):\n"
        "    (_folder().path / '.0123456789abcdef.partial').write_bytes(b'half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(600)\n",
        tmp_path,
    )
    assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
    assert list(tmp_path.rglob("*.partial"))
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert output(start(COMPILE, tmp_path)).startswith("compiling 2 kernels")
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["post.o", "select.o"]


def full() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


FAILING: dict[str, tuple[Callable[[Path], Path], dict]] = {
    "a file in its place": (lambda path: path / "file", {}),
    "no more room": (lambda path: path / "full", {"preexec_fn": full}),
    "a device": (lambda path: Path("/dev/null"), {}),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_folder_that_cannot_be_written_to_is_named_once(tmp_path: Path, case: str):
    (tmp_path / "file").write_text("not a folder")
    place, options = FAILING[case]
    out = output(start(COMPILE, place(tmp_path), **options)).splitlines()
    assert out[0].startswith("compiling 2 kernels") and f"{out[-1]}\n" == STEPS
    assert len(out) == 3 and str(place(tmp_path)) in out[1] and "KEELBACK_CACHE" in out[1]
    assert not list(tmp_path.rglob("*.partial"))


def test_warmup_says_what_is_wrong_with_the_folder():
    environment = {**os.environ, "KEELBACK_CACHE": __file__}
    command = [sys.executable, "-m", "keelback.cli", "warmup"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "cannot be kept" in done.stderr and __file__ in done.stderr


def test_warmup_compiles_what_any_model_needs(tiny_model):
    command = [sys.executable, "-m", "keelback.cli", "warmup"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    folder, _, count = done.stdout.strip().rpartition(": ")
    kernels = all_kernels()
    assert count == f"{len(kernels)} kernels" and Path(folder).name == key()
    assert {name for name, _ in kernels} <= {file.stem for file in Path(folder).glob("*.o")}
    for name in ("mamba-q8", "mamba2-g2", "gdn-gate"):
        backend = tiny_model(name).backend
        assert isinstance(backend, CpuBackend) and set(backend._program.kernels) <= set(kernels)


def test_old_folders_are_pruned_and_nothing_else(folder: ObjectFolder, tmp_path: Path):
    others = [tmp_path / (f"{age}" * 24) for age in range(1, KEPT_FOLDERS + 3)]
    for age, other in enumerate(others):
        other.mkdir()
        (other / "post.o").write_bytes(b"code")
        if other is others[-1]:
            (other / "letter.txt").write_text("not keelback's")
        os.utime(other, (1e9 - age, 1e9 - age))
    (tmp_path / "mine").mkdir()
    with folder.writing(lambda: None):
        folder.write("post", b"code")
    assert folder.read("post") == b"code"
    kept = [other for other in others if other.exists()]
    assert kept == [*others[:KEPT_FOLDERS], others[-1]]
    assert [file.name for file in others[-1].iterdir()] == ["letter.txt"]
    assert (tmp_path / "mine").is_dir()


def test_a_writer_that_does_not_end_is_not_waited_for(
    folder: ObjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    waited: list[str] = []
    with folder.writing(lambda: None):
        with ObjectFolder("0" * 24).writing(lambda: waited.append("waited")):
            folder.write("post", b"code")
        assert waited == ["waited"]
    descriptor = os.open(tmp_path / "lock", os.O_RDWR)
    assert try_lock(descriptor)
    os.close(descriptor)
    assert folder.trouble is None and folder.read("post") == b"code"


def test_damaged_kernels_are_compiled_anew(tmp_path: Path):
    assert output(start(COMPILE, tmp_path)).endswith(STEPS)
    for file in tmp_path.rglob("*.o"):
        file.write_bytes(file.read_bytes()[:-100])
    again = output(start(COMPILE, tmp_path))
    assert again.startswith("compiling 2 kernels") and again.endswith(STEPS)
    assert output(start(COMPILE, tmp_path)) == "[] 2\n"


def test_a_damaged_file_counts_as_missing(folder: ObjectFolder):
    folder.write("post", b"code")
    file = folder.path / "post.o"
    (folder.path / "select.o").write_bytes(file.read_bytes())
    assert folder.read("select") is None  # another kernel's code under its name
    file.write_bytes(file.read_bytes()[:-1])
    assert folder.read("post") is None


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are another matter there")
def test_code_that_others_can_write_is_not_run(folder: ObjectFolder):
    folder.write("add", b"code")
    assert folder.read("add") == b"code"
    folder.path.chmod(0o777)
    assert folder.read("add") is None
    folder.write("add", b"other")
    assert folder.trouble is not None and "other users can write to it" in folder.trouble
    folder.path.chmod(0o700)
    assert folder.read("add") == b"code"
