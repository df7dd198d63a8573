"""imatrix files: what is written is read again, and what is damaged is refused with a sentence."""

from __future__ import annotations

import random
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from keelback.kernels.errors import InvalidFile, InvalidInput
from keelback.kernels.formats import imatrix
from keelback.kernels.formats.blocks import F16, F32
from keelback.kernels.formats.gguf_writer import NewTensor, write_file
from keelback.kernels.formats.imatrix import Importance
from keelback.kernels.formats.metadata import Value

DENSE, EXPERTS = "blk.0.ssm_in.weight", "blk.1.ffn_up_exps.weight"
MUTATIONS = 300


def example() -> Importance:
    rng = np.random.default_rng(1)
    sums = {EXPERTS: (3, 8), DENSE: (1, 64)}
    return Importance(
        sums={name: rng.random(shape, np.float32) for name, shape in sums.items()},
        counts={
            EXPERTS: np.array([4, 0, 2], np.float32),
            DENSE: np.array([512], np.float32),
        },
        datasets=["wiki.txt", "größer.txt"],
        chunks=7,
        chunk_size=512,
    )


def same(one: Importance, other: Importance) -> bool:
    return (
        one.sums.keys() == other.sums.keys()
        and all(np.array_equal(one.sums[name], other.sums[name]) for name in one.sums)
        and all(np.array_equal(one.counts[name], other.counts[name]) for name in one.sums)
        and (one.datasets, one.chunks, one.chunk_size)
        == (other.datasets, other.chunks, other.chunk_size)
    )


def written(path: Path, entries: dict[str, Value], tensors: dict[str, Any]) -> Path:
    """A file with whatever it is given; tensors as arrays of float32 or float16."""
    new = [
        NewTensor(
            name, array.shape, F16 if array.dtype == np.float16 else F32, array.nbytes,
            partial(iter, [array.tobytes()]),
        )
        for name, array in tensors.items()
    ]  # fmt: skip
    write_file(path, entries, new, lambda done, total: None)
    return path


KIND = {"general.type": Value.of("imatrix", "str")}
ONE = {"a.in_sum2": np.ones(8, np.float32), "a.counts": np.ones(1, np.float32)}


def test_what_is_written_is_read_again(tmp_path: Path):
    imatrix.write(tmp_path / "a.gguf", example())
    assert same(imatrix.read(tmp_path / "a.gguf"), example())
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_the_file_has_the_names_and_types_of_llamacpps(tmp_path: Path):
    imatrix.write(tmp_path / "a.gguf", example())
    reader = GGUFReader(tmp_path / "a.gguf")
    found = {tensor.name: list(tensor.shape) for tensor in reader.tensors}
    assert found == {
        f"{DENSE}.in_sum2": [64], f"{DENSE}.counts": [1],
        f"{EXPERTS}.in_sum2": [8, 3], f"{EXPERTS}.counts": [1, 3],
    }  # fmt: skip
    keys = {key: field.types[0].name for key, field in reader.fields.items() if "." in key}
    assert keys | {"GGUF.version": "", "GGUF.tensor_count": "", "GGUF.kv_count": ""} == {
        "GGUF.version": "", "GGUF.tensor_count": "", "GGUF.kv_count": "",
        "general.type": "STRING", "imatrix.datasets": "ARRAY",
        "imatrix.chunk_count": "UINT32", "imatrix.chunk_size": "UINT32",
    }  # fmt: skip


def test_a_file_of_another_writer_is_read(tmp_path: Path):
    """As newer versions of llama.cpp write it: with shapes in full, and statistics beside them."""
    expected = example()
    writer = GGUFWriter(tmp_path / "a.gguf", "unused")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", expected.datasets)
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_array("imatrix.stats_schema", ["mean", "entropy"])
    for name, sums in expected.sums.items():
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.in_sum", -sums)
        writer.add_tensor(f"{name}.counts", expected.counts[name][:, None])
        writer.add_tensor(f"{name}.stats", np.full(2, np.nan, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert same(imatrix.read(tmp_path / "a.gguf"), expected)


def test_the_mean_is_taken_expert_by_expert():
    importance = example()
    mean = importance.of(EXPERTS)
    assert mean.dtype == np.float32 and mean.shape == (3, 8)
    assert np.array_equal(mean[0], importance.sums[EXPERTS][0] / 4)
    assert np.array_equal(mean[1], np.ones(8, np.float32))  # was never asked
    assert np.array_equal(importance.of(DENSE), importance.sums[DENSE] / 512)


def test_a_name_without_room_for_the_ending_is_refused(tmp_path: Path):
    long = Importance({"x" * 60: np.ones((1, 4))}, {"x" * 60: np.ones(1)})
    with pytest.raises(InvalidInput, match="shorten"):
        imatrix.write(tmp_path / "a.gguf", long)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entries", "tensors", "sentence"),
    [
        ({}, ONE, "holds no importance matrix"),
        ({"general.type": Value.of("model", "str")}, ONE, "holds no importance matrix"),
        (KIND, {}, "holds no entry"),
        (KIND, {"a.in_sum2": ONE["a.in_sum2"]}, r"lacks the tensor a\.counts"),
        (KIND, {"a.counts": ONE["a.counts"]}, r"lacks the tensor a\.in_sum2"),
        (KIND, ONE | {"a.counts": np.ones(3, np.float32)}, "3 counts for the 1 matrices of a"),
        (KIND, ONE | {"a.counts": np.full(1, 0.5, np.float32)}, "for a that are no whole numbers"),
        (KIND, ONE | {"a.in_sum2": np.ones(8, np.float16)}, r"a\.in_sum2 as F16"),
        (
            KIND,
            ONE | {"a.in_sum2": np.full(8, np.nan, np.float32)},
            r"in a\.in_sum2 that are below",
        ),
        (KIND, ONE | {"a.in_sum2": np.full(8, -1, np.float32)}, r"in a\.in_sum2 that are below"),
        (KIND, ONE | {"a.counts": np.full(1, np.inf, np.float32)}, r"in a\.counts that are below"),
        (KIND | {"imatrix.datasets": Value.of("x", "str")}, ONE, "no list of texts"),
        (KIND | {"imatrix.datasets": Value.of([1], "arr[u32]")}, ONE, "no list of texts"),
        (KIND | {"imatrix.chunk_count": Value.of(-1, "i32")}, ONE, "no count"),
        (KIND | {"imatrix.chunk_size": Value.of(True, "bool")}, ONE, "no count"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    tmp_path: Path, entries: dict[str, Value], tensors: dict[str, Any], sentence: str
):
    path = written(tmp_path / "a.gguf", entries, tensors)
    with pytest.raises(InvalidFile, match=sentence) as refused:
        imatrix.read(path)
    assert str(path) in str(refused.value)


def test_facts_about_the_text_may_be_missing(tmp_path: Path):
    entries = KIND | {"imatrix.datasets": Value.of([], "arr[u32]")}
    found = imatrix.read(written(tmp_path / "a.gguf", entries, ONE))
    assert (found.datasets, found.chunks, found.chunk_size) == ([], 0, 0)


def test_the_former_format_is_named_with_its_remedy(tmp_path: Path):
    path = tmp_path / "old.dat"
    name = DENSE.encode()
    path.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<iif", 1, 1, 2.5))
    with pytest.raises(InvalidFile, match=r"former format.* --in-file old\.dat -o old\.gguf"):
        imatrix.read(path)


def test_other_files_are_no_imatrix(tmp_path: Path):
    for name, data in (("empty", b""), ("text", b"hello"), ("long", bytes(999))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidFile, match=name):
            imatrix.read(tmp_path / name)
    with pytest.raises(InvalidFile, match="no such file"):
        imatrix.read(tmp_path / "missing")


def test_damaged_files_are_read_or_refused(tmp_path: Path):
    """Whatever byte is wrong: numbers that can be used, or a sentence."""
    imatrix.write(path := tmp_path / "a.gguf", example())
    sound, draw, read = path.read_bytes(), random.Random(1), 0
    for _ in range(MUTATIONS):
        data = bytearray(sound[: draw.choice([len(sound), draw.randrange(len(sound))])])
        for _ in range(draw.randint(0, 3)):
            if data:
                data[draw.randrange(len(data))] = draw.choice([0, 1, 127, 128, 255])
        path.write_bytes(data)
        try:
            found = imatrix.read(path)
        except InvalidFile:
            continue
        read += 1
        for name in found.sums:
            assert np.isfinite(found.of(name)).all() and (found.of(name) >= 0).all()
    # Measured: 77.
    assert MUTATIONS // 10 < read < MUTATIONS
