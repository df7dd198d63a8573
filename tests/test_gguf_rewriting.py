"""Whatever a GGUF file holds survives being split, merged and set, byte for byte."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from keelback.convert.edit import merge, set_pair, split
from keelback.kernels.formats import blocks
from keelback.kernels.formats.gguf import GGUF
from keelback.kernels.formats.gguf_writer import NewTensor, write_file
from keelback.kernels.formats.metadata import SCALARS, STRING, Value


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def tensor(name: str, block: blocks.BlockFormat, data: bytes, shape: tuple[int, ...]) -> NewTensor:
    return NewTensor(name, shape, block, len(data), partial(iter, [data]))


def texts(count: int) -> some.SearchStrategy[bytes]:
    """The bytes of `count` texts, UTF-8 or not."""
    one = some.binary(max_size=9).map(lambda raw: struct.pack("<Q", len(raw)) + raw)
    return some.lists(one, min_size=count, max_size=count).map(b"".join)


def raw(code: int, count: int) -> some.SearchStrategy[bytes]:
    size = 0 if code == STRING else count * SCALARS[code].itemsize
    return texts(count) if code == STRING else some.binary(min_size=size, max_size=size)


CODES = some.sampled_from([*SCALARS, STRING])
VALUES = some.one_of(
    CODES.flatmap(lambda code: raw(code, 1).map(partial(Value, code))),
    some.tuples(CODES, some.integers(0, 5)).flatmap(
        lambda drawn: raw(*drawn).map(lambda data: Value(drawn[0], data, drawn[1]))
    ),
)
# All but those that say how a file is laid out.
KEYS = some.text(min_size=1, max_size=20).filter(
    lambda key: (
        key.isprintable()
        and key.encode(errors="replace").decode() == key
        and not key.startswith(("split.", "general."))
    )
)
ALIGNMENTS = some.sampled_from([8, 32, 64, 1024])
TYPES = some.sampled_from(["F32", "F16", "Q8_0", "I8"])
TENSORS = some.lists(some.tuples(TYPES, some.integers(1, 9)), min_size=3, max_size=7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(some.dictionaries(KEYS, VALUES, max_size=8), TENSORS, ALIGNMENTS, some.randoms())
def test_whatever_a_file_holds_survives_being_rewritten(
    tmp_path_factory, pairs, drawn, alignment, r
):
    folder = tmp_path_factory.mktemp("rewritten")
    entries = {**pairs, "general.architecture": Value.of("toy", "str")}
    if alignment != 32:
        entries["general.alignment"] = Value.of(alignment, "u32")
    tensors = []
    for index, (name, rows) in enumerate(drawn):
        block = blocks.BY_NAME[name]
        data = r.randbytes(rows * block.nbytes)
        tensors.append(tensor(f"t{index}", block, data, (rows, block.elements)))
    source = folder / "source.gguf"
    write_file(source, entries, tensors, silent)

    def held(path: Path) -> dict[str, bytes]:
        return {key: value.encoded() for key, value in GGUF(path).metadata.entries.items()}

    before = held(source)
    assert before == {key: value.encoded() for key, value in entries.items()}
    content = {t.name: b"".join(t.chunks()) for t in tensors}
    parts = split(source, str(folder / "part"), max_tensors=-(-len(tensors) // 3))
    assert len(parts) == 3 or len(tensors) in (4,)
    whole = merge(parts[0], folder / "whole.gguf")
    assert whole.read_bytes() == source.read_bytes()
    changed = set_pair(whole, "a new key", "-7", "i16")
    after = held(changed)
    assert list(after) == [*before, "a new key"] and after.pop("a new key")[4:] == b"\xf9\xff"
    assert after == before
    file = GGUF(changed)
    assert {name: file.data(info).tobytes() for name, info in file.tensors.items()} == content
    assert file.alignment == alignment
    assert set_pair(whole, "a new key", None).read_bytes() == source.read_bytes()
    for value in file.metadata.entries.values():
        value.decode()


@pytest.mark.parametrize("alignment", [32, 64])
def test_the_writer_writes_what_the_reference_writes(tmp_path: Path, alignment: int):
    matrix = np.arange(70, dtype=np.float32).reshape(7, 10)
    theirs = gguf.GGUFWriter(tmp_path / "theirs.gguf", "toy")
    if alignment != 32:
        theirs.add_custom_alignment(alignment)
    kinds = gguf.GGUFValueType
    for index, kind in enumerate(k for k in kinds if k is not kinds.ARRAY):
        theirs.add_key_value(f"one.{index}", "a" if kind is kinds.STRING else 1, kind)
    theirs.add_array("words", ["", "naïve"])
    theirs.add_array("numbers", [-1, 2])
    theirs.add_tensor("matrix", matrix)
    theirs.add_tensor("row", matrix[0])
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_tensors_to_file()
    theirs.close()
    names = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "u64", "i64", "f64")
    entries = {"general.architecture": Value.of("toy", "str")}
    if alignment != 32:
        entries["general.alignment"] = Value.of(alignment, "u32")
    for index, name in enumerate(names):
        entries[f"one.{index}"] = Value.of("a" if name == "str" else 1, name)
    entries["words"] = Value.of(["", "naïve".encode()], "arr[str]")
    entries["numbers"] = Value.of([-1, 2], "arr[i32]")
    tensors = [
        tensor("matrix", blocks.F32, matrix.tobytes(), matrix.shape),
        tensor("row", blocks.F32, matrix[0].tobytes(), (10,)),
    ]
    write_file(tmp_path / "ours.gguf", entries, tensors, silent)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
