"""`keelback gguf`: what is set, shown and checked, and what goes wrong meanwhile."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import keelback
from keelback import models
from keelback.cli import main
from keelback.convert.edit import set_pair, split, stored
from keelback.engine.check import check
from keelback.engine.dump import dump_lines
from keelback.kernels.formats import blocks
from keelback.kernels.formats.finite import not_finite
from keelback.kernels.formats.gguf import GGUF
from keelback.kernels.formats.gguf_writer import NewTensor, write_file
from keelback.kernels.formats.metadata import KINDS, Value

MUTATIONS = 100


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def tool(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["gguf", *map(str, arguments)])


# Setting.


@pytest.fixture
def model(tiny_file, tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_file("mamba-tied", "f32").read_bytes())
    return path


SET = [
    ("u8", "255", 255), ("i8", "-128", -128), ("u16", "65535", 65535), ("i16", "-2", -2),
    ("u32", "4294967295", 4294967295), ("i32", "-2", -2), ("u64", str(2**64 - 1), 2**64 - 1),
    ("i64", str(-(2**63)), -(2**63)), ("f32", "1e-5", float(np.float32(1e-5))), ("f64", "0.1", 0.1),
    ("f32", "-inf", -np.inf), ("bool", "true", True), ("bool", "False", False),
    ("str", "naïve\n", "naïve\n"), ("str", "", ""), ("arr[str]", '["a", ""]', ["a", ""]),
    ("arr[i32]", "[1, -2]", [1, -2]), ("arr[f64]", "[1, 0.5]", [1.0, 0.5]), ("arr[u8]", "[]", []),
    ("arr[bool]", "[true, false]", [True, False]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "value"), SET)
def test_values_of_every_type_are_set_and_keep_it(model: Path, kind: str, text: str, value: Any):
    assert tool("set", model, "my.key", text, "--type", kind).exit_code == 0
    entry = GGUF(model).metadata.entries["my.key"]
    assert entry.kind == kind and np.array_equal(entry.decode(), value)
    # The second time the key says what type it has.
    assert tool("set", model, "my.key", text).exit_code == 0
    assert GGUF(model).metadata.entries["my.key"].encoded() == entry.encoded()
    assert tool("set", model, "my.key", "--remove").exit_code == 0
    assert "my.key" not in GGUF(model).metadata


REFUSED = [
    ("u8", "256"), ("u8", "-1"), ("u32", "1.5"), ("f32", "1e39"), ("f32", "x"), ("bool", "2"),
    ("arr[i32]", "1"), ("arr[i32]", "[1"), ("arr[i32]", "[1.5]"), ("arr[str]", "[1]"),
    ("arr[str]", '["\\ud800"]'), ("arr[bool]", '["false"]'),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), REFUSED)
def test_values_that_do_not_fit_are_refused(model: Path, kind: str, text: str):
    before = model.read_bytes()
    done = tool("set", model, "my.key", text, "--type", kind)
    assert done.exit_code == 1 and f"{text!r} is no value of the type {kind}" in done.stderr
    assert model.read_bytes() == before and list(model.parent.iterdir()) == [model]


@pytest.mark.parametrize(
    "key",
    ["general.architecture", "general.alignment", "split.count", "mamba.block_count",
     "general.file_type", "mamba.ssm.state_size"],
)  # fmt: skip
def test_keys_by_which_the_tensors_are_read_want_force(model: Path, key: str):
    before = model.read_bytes()
    done = tool("set", model, key, "64", "--type", "u32")
    assert done.exit_code == 1 and "add --force" in done.stderr and model.read_bytes() == before
    assert tool("set", model, key, "--remove").exit_code == 1
    kind = "str" if key == "general.architecture" else "u32"
    assert tool("set", model, key, "64", "--type", kind, "--force").exit_code == 0
    assert model.read_bytes() != before


def test_another_alignment_moves_the_tensors_and_a_wrong_one_is_refused(model: Path):
    before, logits = model.read_bytes(), keelback.load(model).forward([1, 2])[0]
    force = ("--type", "u32", "--force")
    assert tool("set", model, "general.alignment", "4096", *force).exit_code == 0
    file = GGUF(model)
    assert all(info.offset % 4096 == 0 for info in file.tensors.values())
    assert (keelback.load(model).forward([1, 2])[0] == logits).all()
    assert "power of two" in tool("set", model, "general.alignment", "24", *force).stderr
    assert tool("set", model, "general.alignment", "--remove", "--force").exit_code == 0
    assert model.read_bytes() == before


def test_set_writes_beside_and_keeps_what_the_file_is(model: Path, tmp_path: Path):
    out, before = tmp_path / "out.gguf", model.read_bytes()
    assert tool("set", model, "general.name", "new", "--out", out).exit_code == 0
    assert model.read_bytes() == before and GGUF(out).metadata["general.name"] == "new"
    assert "is read here" in tool("set", model, "general.name", "b", "--out", model).stderr
    model.chmod(0o640)
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    assert tool("set", link, "general.name", "linked").exit_code == 0
    assert link.is_symlink() and GGUF(model).metadata["general.name"] == "linked"
    assert model.stat().st_mode & 0o777 == 0o640
    model.chmod(0o440)
    assert "is read-only" in tool("set", model, "general.name", "x").stderr
    assert GGUF(model).metadata["general.name"] == "linked"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("my.key", "1"), "there is no key my.key yet; say its type with --type"),
        (("my.key", "--remove"), "has no key my.key that could be removed"),
        (("my\nkey", "1", "--type", "u8"), "can be no key"),
        (("", "1", "--type", "u8"), "can be no key"),
        (("a", "[]", "--type", "arr[arr[i32]]"), "there is no type 'arr[arr[i32]]'"),
        (("my.key",), "give either a VALUE or --remove"),
        (("my.key", "1", "--remove"), "give either a VALUE or --remove"),
        (("general.name", "--remvoe"), "there is no option --remvoe"),
    ],
)
def test_set_says_what_it_cannot_do(model: Path, arguments: tuple[str, ...], said: str):
    done = tool("set", model, *arguments)
    assert done.exit_code in (1, 2) and said in done.stderr


def test_of_a_model_in_parts_the_first_is_changed(model: Path, tmp_path: Path):
    parts = split(model, str(tmp_path / "x"), max_tensors=9)
    others = [path.read_bytes() for path in parts[1:]]
    assert tool("set", parts[0], "general.name", "new").exit_code == 0
    assert GGUF(parts[0]).metadata["general.name"] == "new"
    assert [path.read_bytes() for path in parts[1:]] == others
    done = tool("set", parts[0], "general.name", "x", "--out", tmp_path / "y.gguf")
    assert "merge them first" in done.stderr


# What goes wrong while files are written.

JOBS = {
    "set": lambda model, folder: ("set", model, "general.name", "new"),
    "set --out": lambda model, folder: (
        "set", model, "general.name", "new", "--out", folder / "target.gguf"),
    "split": lambda model, folder: ("split", model, folder / "x", "--split-max-tensors", "2"),
    "merge": lambda model, folder: ("merge", model, folder / "target.gguf"),
}  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_a_full_disk_leaves_every_file_as_it_was(model: Path, tmp_path: Path, job: str):
    """A limit on the size of files stands for the disk."""
    if job == "merge":
        model = split(model, str(tmp_path / "parts"), max_tensors=9)[0]
    (tmp_path / "target.gguf").write_bytes(b"old")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-m", "keelback.cli", "gguf", *map(str, JOBS[job](model, tmp_path))]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (3000, 3000))
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=60)
    assert done.returncode == 1 and "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_is_not_there_is_named(model: Path, tmp_path: Path):
    for job in ("set --out", "split"):
        done = tool(*JOBS[job](model, tmp_path / "missing"))
        assert done.exit_code == 1 and "missing is no folder" in done.stderr


def test_a_file_that_changes_while_it_is_copied_is_refused(model: Path, tmp_path: Path):
    file = GGUF(model)
    info = next(iter(file.tensors.values()))
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes())
    os.replace(other, model)
    with pytest.raises(keelback.InvalidFile, match="was changed while it was read"):
        list(file.chunks(info, 100))
    model.unlink()
    with pytest.raises(keelback.InvalidFile, match="cannot be read"):
        list(file.chunks(info, 100))


def test_mutated_files_are_rewritten_or_get_a_sentence_but_never_crash(model: Path, tmp_path: Path):
    source, start = model.read_bytes(), GGUF(model).parts[0].data_start
    random, refused = np.random.RandomState(6), 0
    path, out = tmp_path / "mutated.gguf", tmp_path / "out.gguf"
    jobs = (
        lambda: set_pair(path, "my.key", "1", "u8", out),
        lambda: split(path, str(tmp_path / "x"), "20K"),
        lambda: list(dump_lines(path, full=True, tensors=True)),
    )
    for _ in range(MUTATIONS):
        content = bytearray(source)
        for _ in range(random.randint(1, 4)):
            at = random.randint(0, start)
            content[at : at + random.randint(0, 3)] = random.bytes(random.randint(0, 3))
        # Beside it first: what is open stays what it was.
        out.write_bytes(content)
        out.replace(path)
        for job in jobs:
            try:
                job()
            except keelback.KeelbackError as error:
                refused += 1
                assert len(str(error)) < 500 and str(error).isprintable()
        check(path, silent)
    assert MUTATIONS < refused < 3 * MUTATIONS


# Checking.


def spoiled(model: Path, name: str, at: int, data: bytes) -> Path:
    """A copy with other bytes in a tensor."""
    info, content = GGUF(model).tensors[name], bytearray(model.read_bytes())
    content[info.offset + at : info.offset + at + len(data)] = data
    path = model.with_name("spoiled.gguf")
    path.write_bytes(content)
    return path


def test_sound_files_are_called_so(tiny_file, tmp_path: Path):
    parts = split(tiny_file("mamba2-g2", "f32"), str(tmp_path / "x"), max_tensors=9)
    files = [models.DEMO, *parts, *(tiny_file("mamba-q8", t) for t in ("q8_0", "q4_0", "q4_k_m"))]
    done = tool("check", *files)
    assert done.exit_code == 0 and done.stdout.count(": ok, ") == 5
    facts = json.loads(tool("check", models.DEMO, "--json").stdout)
    size, path = models.DEMO.stat().st_size, str(models.DEMO)
    wanted = {"file": path, "parts": [path], "tensors": 73, "bytes": size, "problems": []}
    assert facts == [wanted]
    alone = tool("check", *parts[1:])
    assert alone.exit_code == 1 and alone.stdout.count("name the first") == len(parts) - 1


def test_values_and_scales_that_are_not_finite_are_counted(tiny_file, model: Path):
    numbers = np.array([np.nan, np.inf, -np.inf, 1], np.float32).tobytes()
    path = spoiled(model, "blk.0.ssm_a", 8, numbers)
    done = tool("check", path)
    assert done.exit_code == 1 and done.stdout == (
        f"{path}: 1 values of the tensor blk.0.ssm_a (F32) are NaN and 2 infinite; download or "
        "convert it again\n"
    )
    model.write_bytes(tiny_file("mamba-q8", "q4_k_m").read_bytes())
    path = spoiled(model, "blk.0.ssm_in.weight", 144 * 3 + 2, b"\x00\x7c")
    (facts,) = json.loads(tool("check", path, "--json").stdout)
    (problem,) = facts["problems"]
    assert "0 scales of the tensor blk.0.ssm_in.weight (Q4_K) are NaN and 1 infinite" in problem


def test_what_cannot_be_run_is_a_problem_too(model: Path, tmp_path: Path):
    def problems(path: Path) -> list[str]:
        return check(path, silent)["problems"]

    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-100])
    (said,) = problems(cut)
    assert "ends before its tensor" in said
    assert "no such file" in problems(tmp_path / "missing.gguf")[0]
    long = tmp_path / "long.gguf"
    long.write_bytes(model.read_bytes() + bytes(33))
    (said,) = problems(long)
    assert "33 bytes follow the last tensor" in said
    set_pair(model, "general.architecture", "strange", force=True)
    path = spoiled(model, "token_embd.weight", 0, b"\xff" * 4)
    first, second = problems(path)
    assert "the architecture 'strange' is not known" in first and "token_embd.weight" in second
    set_pair(model, "general.type", "imatrix")
    assert "holds no model (general.type is 'imatrix')" in problems(model)[0]


DECODED = [name for name, block in blocks.BY_NAME.items() if blocks.readable(block)]


@pytest.mark.parametrize("name", sorted({*DECODED} - {"MXFP4"}))
def test_scales_are_looked_for_where_the_decoder_finds_them(name: str):
    block = blocks.BY_NAME[name]
    random = np.random.RandomState(5)
    data = random.randint(0, 256, (400, block.nbytes)).astype(np.uint8)
    if block.elements == 1:
        # Else few of all values would be special.
        data[::3, -1] = random.choice([0x7F, 0xFF, 0x7C, 0xFC], len(data[::3]))
        data[::3, -2] = random.choice([0xF0, 0xF8, 0x80, 0x00], len(data[::3]))
    elif name != "NVFP4":
        places = random.randint(0, block.nbytes - 1, len(data))
        for row, place in zip(data, places, strict=True):
            row[place : place + 2] = 0x00, 0x7C
    values = blocks.dequantize(data.reshape(-1), block, (len(data), block.elements))
    wrong = ~np.isfinite(values).all(1)
    if block.name == "F64":  # what float32 cannot hold is infinite there only
        wrong = ~np.isfinite(data.view(np.float64)[:, 0])
    found = [sum(not_finite(memoryview(row.tobytes()), block)) for row in data]
    assert [count > 0 for count in found] == wrong.tolist()
    assert wrong.any() == (name != "NVFP4") and not wrong.all()
    assert sum(not_finite(memoryview(data.tobytes()), block)) == sum(found)


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7C01, 0xFFFF, 0x7BFF, 0x0000])
def test_nan_and_infinity_are_told_apart(bits: int):
    data = memoryview(struct.pack("<HH", bits, 0x3C00))
    number = np.uint16(bits).view(np.float16)
    assert not_finite(data, blocks.F16) == (int(np.isnan(number)), int(np.isinf(number)))


def test_an_exponent_of_mxfp4_that_stands_for_nan_is_found():
    data = bytearray(17 * 3)
    data[17] = 0xFF
    assert not_finite(memoryview(data), blocks.BY_NAME["MXFP4"]) == (1, 0)


# Showing.


def test_dump_shows_all_kinds_and_escapes_what_acts_on_a_terminal(tmp_path: Path):
    path = tmp_path / "all.gguf"
    numbers = {"bool": True, "f32": 1e-5, "f64": 0.1}
    entries = {
        f"key.{kind}": Value.of([numbers.get(kind[4:-1], 7)] * 9, kind)
        if kind.startswith("arr")
        else Value.of(numbers.get(kind, 7), kind)
        for kind in KINDS
        if "str" not in kind
    }
    entries["text"] = Value.of("\x1b[2J" + "x" * 100, "str")
    entries["texts"] = Value.of([b"\xff", "é"], "arr[str]")
    entries["odd"] = Value.of([float("nan"), float("inf")], "arr[f32]")
    new = NewTensor("t", (2, 3), blocks.F16, 12, partial(iter, [bytes(12)]))
    write_file(path, entries, [new], silent)
    lines = tool("dump", path).stdout.splitlines()
    assert "GGUF version 3, alignment 32" in lines[0] and "\x1b" not in "".join(lines)
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[2:]}
    assert shown["key.f32"].split() == ["f32", "1e-05"]
    assert shown["key.arr[u8]"] == "arr[u8]    [7, 7, 7, 7, 7, 7] and so on: 9"
    assert shown["text"].startswith(r'str        "\u001b[2Jxxx') and shown["text"].endswith(
        "... 104 characters"
    )
    assert shown["t"].split()[:3] == ["F16", "[2,", "3]"]
    facts = json.loads(tool("dump", path, "--json", "--full", "--no-tensors").stdout)
    assert "tensors" not in facts
    assert facts["metadata"]["odd"] == {"type": "arr[f32]", "count": 2, "value": ["nan", "inf"]}
    assert facts["metadata"]["texts"]["value"] == ["\ufffd", "é"]
    assert {entry["type"] for entry in facts["metadata"].values()} == set(KINDS)
    assert len(facts["metadata"]["key.arr[u8]"]["value"]) == 9
    assert facts["metadata"]["text"]["value"] == "\x1b[2J" + "x" * 100
    assert len(json.loads(tool("dump", path, "--json").stdout)["tensors"]) == 1
    assert "x" * 100 in tool("dump", path, "--full").stdout


def test_stored_tensors_are_read_a_piece_at_a_time(tiny_file):
    file = GGUF(tiny_file("mamba-tied", "f32"))
    info = file.tensors["token_embd.weight"]
    pieces = [bytes(piece) for piece in file.chunks(info, 1000)]
    assert {len(piece) for piece in pieces[:-1]} == {1000}
    assert b"".join(pieces) == file.data(info).tobytes()
    assert b"".join(stored(file, [info])[0].chunks()) == file.data(info).tobytes()
