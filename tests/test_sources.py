"""Weight files read without the libraries that wrote them, and what hostile ones come to."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiny_files
from keelback.convert.source import TYPES, Scaled, equal
from keelback.convert.torch_file import read_torch
from keelback.kernels.errors import InvalidFile, UnsupportedModel

RANDOM = np.random.default_rng(3)
TENSORS = {
    "a.weight": tiny_files.raw(RANDOM.standard_normal((5, 7)).astype(np.float32), "F32"),
    "b": tiny_files.raw(RANDOM.standard_normal((3, 1, 4)).astype(np.float32), "BF16"),
    "c": tiny_files.raw(RANDOM.standard_normal(9).astype(np.float32), "F16"),
    "scalar": tiny_files.raw(RANDOM.standard_normal(()).astype(np.float32), "F64"),
}


def archive(path: Path, program: bytes, **members: bytes) -> Path:
    """An archive as torch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", program)
        for name, content in members.items():
            file.writestr(f"model/{name}", content)
    return path


def test_tensors_of_a_torch_file_are_read_in_place(tmp_path: Path):
    tiny_files.write_torch(path := tmp_path / "model.bin", TENSORS)
    found = read_torch(path)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        got = found[name]
        assert (got.kind, got.shape) == (tensor.kind, tensor.shape)
        want = tiny_files.read(tensor)
        assert np.array_equal(got.read().reshape(want.shape), want)


def test_rows_are_read_by_slice_and_by_index(tmp_path: Path):
    tiny_files.write_torch(path := tmp_path / "model.bin", TENSORS)
    source, whole = read_torch(path)["a.weight"], tiny_files.read(TENSORS["a.weight"])
    for rows in (slice(1, 3), slice(4, 9), np.array([3]), np.array([0, 1, 4, 2, 3, 3, 0])):
        assert np.array_equal(source.read(rows), whole[rows])
    assert equal(source, source) and not equal(source, source.reshaped(7, 5))


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_runs_nothing(tmp_path: Path):
    marker = tmp_path / "it_ran"
    program = pickle.dumps({"a": Attack(marker)}, protocol=2)
    pickle.loads(program)
    assert marker.is_dir()
    marker.rmdir()
    with pytest.raises(UnsupportedModel, match=r"it calls posix\.mkdir; do not trust it"):
        read_torch(archive(tmp_path / "model.bin", program))
    assert not marker.exists()


#: Sixty tuples, each of which holds the one before twice: endless when hashed or printed.
NESTED = b")" + b"q\0h\0\x86" * 60
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"


def tensor(
    first: bytes = b"K\0", shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85"
) -> bytes:
    """A program that makes {"t": a tensor of a storage of four float32 numbers}."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return b"\x80\x02}X\x01\0\0\0t" + call + STORAGE + first + shape + stride + b"\x89}tRs."


#: program -> what is said of it
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is damaged"),
    "no dictionary": (b"\x80\x02K\x01.", "no dictionary"),
    "not a tensor": (pickle.dumps({"x": 1}, 2), "'x' is no tensor"),
    "keys nobody can hash": (b"\x80\x02}" + NESTED + b"K\x01s.", "a tuple stands where a str"),
    "a storage nobody can print": (b"\x80\x02" + NESTED + b"K\0K\0\x87Q.", "something other"),
    "a mark is missing": (b"\x80\x02}u.", "mark"),
    "memo": (b"\x80\x02j\xff\xff\xff\xff.", "damaged"),
    "text of 4 GB": (b"\x80\x02X\xff\xff\xff\xffx.", "damaged"),
    "an array of bytes": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".", "damaged"),
    "an extension": (b"\x80\x02\x82\x01.", "operation EXT1"),
    "an instance": (b"\x80\x02(ios\nsystem\n.", "operation INST"),
    "a new object": (b"\x80\x02cbuiltins\nobject\n)\x81.", "operation NEWOBJ"),
    "attributes of a function": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "damaged"),
    "a tensor beyond its storage": (tensor(first=b"K\x01"), "inside its storage"),
    "a huge tensor": (tensor(shape=b"\x8a\x07" + b"\xff" * 6 + b"\x7f\x85"), "impossible size"),
    "a negative place": (tensor(first=b"J\xff\xff\xff\xff"), "impossible size"),
    "transposed": (tensor(shape=b"K\x02K\x02\x86", stride=b"K\x01K\x02\x86"), "not lie in order"),
    "a repeated number": (tensor(stride=b"K\0\x85"), "not lie in order"),
    "too few strides": (tensor(shape=b"K\x02K\x02\x86"), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_gets_a_sentence(tmp_path: Path, case: str):
    program, said = HOSTILE[case]
    path = archive(tmp_path / "model.bin", program, **{"data/0": bytes(16)})
    with pytest.raises((InvalidFile, UnsupportedModel), match=said) as caught:
        read_torch(path)
    assert str(path) in str(caught.value)


def test_the_program_that_the_hostile_ones_vary_is_sound(tmp_path: Path):
    content = np.arange(4, dtype="<f4").tobytes()
    path = archive(tmp_path / "model.bin", tensor(), **{"data/0": content})
    assert read_torch(path)["t"].read().tolist() == [[0, 1, 2, 3]]


def deflated(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model/data.pkl", tensor())


def with_huge_directory(path: Path) -> None:
    """A directory of 100 MB, which is read as a whole before anything of it is known."""
    size = 100 << 20
    with open(path, "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(4 + size)
        file.seek(0, 2)
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, size, 4, 0))


def cut(path: Path) -> None:
    archive(path, tensor(), **{"data/0": bytes(16)})
    path.write_bytes(path.read_bytes()[:-30])


def moved(path: Path) -> None:
    """A directory whose entries point past the end of the file."""
    archive(path, tensor(), **{"data/0": bytes(16)})
    content = path.read_bytes()
    at = content.index(b"PK\1\2") + 42
    path.write_bytes(content[:at] + struct.pack("<I", 1 << 31) + content[at + 4 :])


ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bare pickle": (lambda path: path.write_bytes(tensor()), "PyTorch 1.6"),
    "empty": (lambda path: path.write_bytes(b""), "PyTorch 1.6"),
    "compressed": (deflated, "as it is"),
    "a huge directory": (with_huge_directory, "a directory of 104857600 bytes"),
    "cut": (cut, "damaged or incomplete"),
    "no pickle": (lambda path: zipfile.ZipFile(path, "w").writestr("m/x", "y"), "lacks data.pkl"),
    "no storage": (lambda path: archive(path, tensor()), r"lacks data/0"),
    "big-endian": (lambda path: archive(path, tensor(), byteorder=b"big"), "big-endian"),
    "entries elsewhere": (moved, "model.bin"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_damaged_archive_gets_a_sentence(tmp_path: Path, case: str):
    make, said = ARCHIVES[case]
    make(path := tmp_path / "model.bin")
    with pytest.raises((InvalidFile, UnsupportedModel), match=said) as caught:
        read_torch(path)
    assert str(path) in str(caught.value)


def test_every_float8_number_is_read():
    codes = np.arange(256, dtype=np.uint8)
    e4m3, e5m2 = (TYPES[kind][1](codes) for kind in ("F8_E4M3", "F8_E5M2"))
    assert np.array_equal(e4m3[:127], tiny_files.E4M3) and np.isnan(e4m3[[127, 255]]).all()
    assert np.array_equal(e4m3[128:255], -tiny_files.E4M3)
    # One bit of sign, five of exponent, two of fraction, and infinities.
    assert e5m2[[0x3C, 0x3D, 0xC0, 0x7B, 1]].tolist() == [1, 1.25, -2, 57344, 2**-16]
    assert np.isinf(e5m2[[0x7C, 0xFC]]).all() and np.isnan(e5m2[0x7D])


@pytest.mark.parametrize("block", [(1, 10), (4, 3), (6, 10), (128, 128)])
def test_float8_matrices_are_scaled_block_by_block(tmp_path: Path, block: tuple[int, int]):
    values = RANDOM.standard_normal((6, 10)).astype(np.float32)
    numbers, factors = tiny_files.float8(values, block)
    tiny_files.write_safetensors(path := tmp_path / "x.safetensors", {"w": numbers})
    from keelback.convert.safetensors_file import read_safetensors

    source = Scaled(read_safetensors(path)["w"], factors, block)
    want = tiny_files.dequantized(numbers, factors, block)
    assert np.array_equal(source.read(), want)
    for rows in (slice(2, 5), np.array([5, 0, 3])):
        assert np.array_equal(source.read(rows), want[rows])
    assert np.abs(want - values).max() < 0.1
    with pytest.raises(UnsupportedModel, match="float8"):
        source.reshaped(10, 6)
