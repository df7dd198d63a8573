"""Conversions and runs that are cut short for real: killed, out of space, without their files.

KEELBACK_KILLS is how often a conversion is killed; a few times without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import keelback
import tiny
from keelback import models
from keelback.convert import convert
from keelback.convert.source import InputFile
from keelback.kernels import files

KILLS = int(os.environ.get("KEELBACK_KILLS", "5"))
CONVERT = (
    "import sys; from keelback.convert import convert\n"
    "print('ready', flush=True); convert(*sys.argv[1:]); print('done', flush=True)"
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="uses what only Linux has")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 64 MB, so that there is time to interrupt what is done with it."""
    folder = tiny.write_checkpoint("mamba-tied", tmp_path_factory.mktemp("large") / "mamba")
    weights = folder / "model.safetensors"
    table = np.random.default_rng(0).standard_normal((400_000, 40), np.float32)
    save_file({**load_file(weights), "backbone.embeddings.weight": table}, weights)
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def keelback_command(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "keelback.cli", *arguments]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, **options
    )


def is_one_sentence(stderr: str) -> bool:
    said = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    return len(said) == 1 and "Traceback" not in stderr


def test_a_killed_conversion_leaves_the_old_file_and_the_next_one_tidies_up(
    checkpoint: Path, tmp_path: Path
):
    target = tmp_path / "model.gguf"
    began = time.perf_counter()
    new = digest(convert(checkpoint, target))
    seconds = time.perf_counter() - began
    target.write_bytes(b"old")
    old, draw, halves = digest(target), random.Random(5), 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", CONVERT, str(checkpoint), str(target)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0, 1.2 * seconds))
        process.kill()
        finished = process.communicate()[0] == b"done\n"
        assert digest(target) in ({new} if finished else {old, new})
        halves += len(list(tmp_path.glob(".*.partial")))
        target.write_bytes(b"old")
    assert digest(convert(checkpoint, target)) == new
    assert os.listdir(tmp_path) == ["model.gguf"]
    print(f"{KILLS} kills, {halves} of them while the new file was being written")


def test_the_file_of_a_running_writer_is_not_tidied_away(checkpoint: Path, tmp_path: Path):
    first, seen = tmp_path / "first.gguf", []

    def convert_beside(*_: int) -> None:
        if not seen:
            seen.append(list(tmp_path.glob(".*.partial")))
            convert(tiny.write_checkpoint("gdn-gate", tmp_path / "gdn"), tmp_path / "second.gguf")
            assert seen[0][0].exists()

    convert(checkpoint, first, progress=convert_beside)
    assert len(seen[0]) == 1 and keelback.load(first).vocabulary == 400_000


@linux
def test_a_new_file_that_another_process_tidies_away_is_made_again(tmp_path: Path, monkeypatch):
    new, others = tmp_path / "new", list[Path]()

    def lock(descriptor: int) -> bool:
        """The first time the other process has the lock already, and unlinks the file later."""
        others.extend(tmp_path.glob(".*.partial"))
        return len(others) > 1

    monkeypatch.setattr(files, "try_lock", lock)
    with files.replacing(new) as partial:
        assert len(others) == 2
        partial.write_text("x")
    assert new.read_text() == "x"


@linux
def test_a_limit_of_the_file_size_gets_a_sentence(checkpoint: Path, tmp_path: Path):
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = keelback_command("convert", str(checkpoint), "-o", str(target), preexec_fn=limit)
    assert done.returncode == 1 and is_one_sentence(done.stderr)
    assert f"{target} cannot be written: File too large" in done.stderr
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.gguf"]


def in_small_disk(folder: Path, size: str, script: str) -> subprocess.CompletedProcess:
    """Run a script where `folder` is a disk of that size; skips where that takes a privilege."""
    folder.mkdir()
    mount = f"mount -t tmpfs -o size={size} none {folder}"
    if shutil.which("unshare") is None:
        pytest.skip("there is no `unshare` here")
    private = ["unshare", "-Urm", "sh", "-ec"]
    if subprocess.run([*private, mount], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    command = [*private, f"{mount}\ncd {folder}\n{script}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


FULL = {
    # What is known beforehand is said beforehand.
    "at the start": f"{sys.executable} -m keelback.cli convert CHECKPOINT -o model.gguf",
    # Another program may take the space meanwhile.
    "in the middle": (
        f"{sys.executable} -c 'import keelback.cli as c\n"
        "import keelback.kernels.formats.gguf_writer as w\n"
        'w.check_space = lambda *_: None; c.main(["convert", "CHECKPOINT", "-o", "model.gguf"])\''
    ),
    "a state": f"{sys.executable} -m keelback.cli run demo -p It -n 2 --state-out model.gguf",
}


@linux
@pytest.mark.parametrize("when", FULL)
def test_a_full_disk_gets_a_sentence(checkpoint: Path, tmp_path: Path, when: str):
    command = FULL[when].replace("CHECKPOINT", str(checkpoint))
    script = f"printf old > model.gguf\n{command} || echo status $?\ncat model.gguf; ls -A"
    done = in_small_disk(tmp_path / "disk", "300k", script)
    assert done.stdout.endswith("status 1\noldmodel.gguf\n"), done.stdout + done.stderr
    said = "GB are free in" if when == "at the start" else "No space left on device"
    assert said in done.stderr and is_one_sentence(done.stderr)


@linux
def test_a_read_only_disk_gets_a_sentence(checkpoint: Path, tmp_path: Path):
    command = FULL["at the start"].replace("CHECKPOINT", str(checkpoint))
    script = f"""
        printf old > model.gguf; mount -o remount,ro {tmp_path / "disk"}
        {command} || echo status $?; cat model.gguf; ls -A"""
    done = in_small_disk(tmp_path / "disk", "200m", script)
    assert done.stdout == "status 1\noldmodel.gguf\n", done.stdout + done.stderr
    assert "Read-only file system" in done.stderr and is_one_sentence(done.stderr)


def test_a_source_that_is_cut_short_while_it_is_read_gets_a_sentence(
    checkpoint: Path, tmp_path: Path
):
    folder = shutil.copytree(checkpoint, tmp_path / "cut")
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")
    with pytest.raises(keelback.InvalidFile, match=r"model\.safetensors ends too early"):
        convert(folder, target, progress=lambda *_: os.truncate(folder / "model.safetensors", 9000))
    assert target.read_bytes() == b"old" and not list(tmp_path.glob(".*"))


def test_a_disk_that_fails_under_the_source_gets_a_sentence(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Failing:
        def __init__(self, file) -> None:
            self.file, self.seek = file, file.seek

        def readinto(self, view: memoryview) -> int:
            if len(view) > 1 << 16:  # more than a header: the numbers of a tensor
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return self.file.readinto(view)

    opened = InputFile.__init__

    def failing(self: InputFile, path: Path) -> None:
        opened(self, path)
        self._file = Failing(self._file)

    monkeypatch.setattr(InputFile, "__init__", failing)
    with pytest.raises(keelback.InvalidFile, match=r"Input/output error.*check the disk"):
        convert(checkpoint, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@linux
@pytest.mark.parametrize("repack", ["--no-repack", "--backend=numpy"])
def test_a_model_file_that_is_cut_short_under_its_map_gets_a_sentence(tmp_path: Path, repack: str):
    path = Path(shutil.copy(models.DEMO, tmp_path / "demo.gguf"))
    command = [sys.executable, "-m", "keelback.cli", "run", str(path), "-p", "It", "--ignore-eos"]
    process = subprocess.Popen(
        [*command, repack], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.read(1)
    os.truncate(path, 5000)
    stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1 and is_one_sentence(stderr)
    assert f"{path} can no longer be read" in stderr


def test_a_checkpoint_is_never_written_over(checkpoint: Path):
    before = digest(checkpoint / "model.safetensors")
    link = checkpoint.parent / "link.gguf"
    link.symlink_to(checkpoint / "model.safetensors")
    for target in (checkpoint / "model.safetensors", link):
        with pytest.raises(keelback.InvalidInput, match="part of the checkpoint"):
            convert(checkpoint, target)
    assert digest(checkpoint / "model.safetensors") == before
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "mamba"
