"""The GGUF reader: what it reads, and what damaged or hostile files come to."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

import keelback
from keelback.engine.model import Model
from keelback.kernels.formats import blocks, part
from keelback.kernels.formats.gguf import GGUF
from keelback.kernels.formats.gguf_writer import NewTensor, write_file


def write(path: Path, fill: Callable[[gguf.GGUFWriter], None], architecture: str = "toy") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_kind_of_value_is_read(tmp_path: Path):
    values = np.random.RandomState(0).standard_normal((3, 32)).astype(np.float32)

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("u32", 7)
        writer.add_int64("i64", -8)
        writer.add_float32("f32", 0.5)
        writer.add_float64("f64", 0.1)
        writer.add_bool("yes", True)
        writer.add_string("text", "naïve ✓")
        writer.add_array("numbers", [1, -2, 3])
        writer.add_array("flags", [True, False])
        writer.add_array("strings", ["", "a", "é" * 300])
        writer.add_tensor("matrix", values)

    file = GGUF(write(tmp_path / "a.gguf", fill))
    kinds = {key: value.kind for key, value in file.metadata.entries.items()}
    assert kinds == {
        "general.architecture": "str", "u32": "u32", "i64": "i64", "f32": "f32", "f64": "f64",
        "yes": "bool", "text": "str", "numbers": "arr[i32]", "flags": "arr[bool]",
        "strings": "arr[str]",
    }  # fmt: skip
    read = {
        key: file.metadata[key] for key in ("u32", "i64", "f32", "f64", "yes", "text", "strings")
    }
    assert read == {
        "u32": 7, "i64": -8, "f32": 0.5, "f64": 0.1, "yes": True, "text": "naïve ✓",
        "strings": ["", "a", "é" * 300],
    }  # fmt: skip
    assert file.metadata["numbers"].tolist() == [1, -2, 3]
    assert file.metadata["flags"].tolist() == [True, False]
    assert file.metadata.length("strings") == 3
    info = file.tensors["matrix"]
    assert info.shape == (3, 32) and info.block is blocks.F32
    assert (blocks.dequantize(file.data(info), info.block, info.shape) == values).all()


def test_q8_0_is_written_byte_for_byte_as_the_reference_writes_it():
    values = np.random.RandomState(1).standard_normal((40, 96)).astype(np.float32)
    values[0], values[1, :64] = np.arange(96) - 47.5, 0
    # Halves, which are rounded away from zero, and the number just below one.
    values[2, :32] = 127
    values[2, 1:8] = 0.5, -0.5, 2.5, -3.5, 0.49999997, 126.5, -126.5
    values[3] *= np.float32(1e-30)
    want = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    got = blocks.quantize(values, blocks.Q8_0)
    assert got.shape == want.shape and np.array_equal(got, want)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_what_is_encoded_here_decodes_as_the_reference_says(name):
    values = np.random.RandomState(1).standard_normal((5, 64)).astype(np.float32)
    block = blocks.BY_NAME[name]
    raw = blocks.quantize(values, block)
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    assert raw.reshape(-1).tobytes() == np.ascontiguousarray(theirs).tobytes()
    ours = blocks.dequantize(raw.reshape(-1), block, values.shape)
    assert (ours == gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType[name])).all()


@pytest.mark.parametrize(
    "name", [*(block.name for block in sorted(blocks.QUANTIZED, key=str)), "TQ1_0", "IQ2_S"]
)
def test_quantized_types_decode_as_the_reference_says(name):
    block = blocks.BY_NAME[name]
    raw = np.random.RandomState(2).randint(0, 60, (2, block.row_bytes(256))).astype(np.uint8)
    ours = blocks.dequantize(raw.reshape(-1), block, (2, 256))
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    assert np.array_equal(ours, theirs.astype(np.float32), equal_nan=True)


def test_a_file_with_types_that_have_no_kernel_runs_and_says_so_once(tiny_file, tmp_path: Path):
    source = GGUF(tiny_file("mamba-q8", "q4_0"))
    odd = gguf.GGMLQuantizationType.TQ2_0

    def fill(writer: gguf.GGUFWriter, widened: bool) -> None:
        for key, value in source.metadata.items():
            if key.startswith("mamba.") or key == "tokenizer.ggml.model":
                add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
                add.get(type(value), writer.add_string)(key, value)
        for info in source.tensors.values():
            values = blocks.dequantize(source.data(info), info.block, info.shape)
            raw = gguf.quants.quantize(values, odd) if info.name.endswith("ssm_in.weight") else None
            if raw is None:
                writer.add_tensor(info.name, values)
            elif widened:
                writer.add_tensor(info.name, gguf.quants.dequantize(raw, odd))
            else:
                writer.add_tensor(info.name, raw, raw_dtype=odd)

    said: list[str] = []
    wide = write(tmp_path / "wide.gguf", partial(fill, widened=True), "mamba")
    path = write(tmp_path / "odd.gguf", partial(fill, widened=False), "mamba")
    for backend in ("cpu", "numpy"):
        expected, _ = Model(wide, backend=backend).forward([1, 2, 3])
        logits, _ = Model(path, backend=backend, notice=said.append).forward([1, 2, 3])
        assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 1e-5
    assert [text for text in said if "TQ2_0" in text] == [
        "tensors of type TQ2_0 are widened to F16 in memory"
    ] * 2


def test_bytes_that_are_no_text_are_read_as_such(tmp_path: Path):
    path = tmp_path / "bytes.gguf"
    path.write_bytes(
        header(pairs=2)
        + text("one") + struct.pack("<IQ", 8, 2) + b"a\xff"
        + text("many") + struct.pack("<IIQQ", 9, 8, 1, 3) + b"\xfe\xffb"
    )  # fmt: skip
    metadata = GGUF(path).metadata
    assert metadata["one"] == "a\ufffd" and metadata["many"] == ["\ufffd\ufffdb"]


@pytest.mark.parametrize("alignment", [8, 64, 65536])
def test_tensors_are_found_at_any_alignment_and_in_any_order(tmp_path: Path, alignment: int):
    """And in a file of version 2, which differs in nothing else."""
    content = header(tensors=2, pairs=1, version=2) + text("general.alignment")
    content += struct.pack("<II", 4, alignment)
    content += tensor("late", [2], offset=2 * alignment) + tensor("early", [1])
    content += bytes(-len(content) % alignment)
    content += struct.pack("<f", 1) + bytes(2 * alignment - 4) + struct.pack("<2f", 2, 3)
    path = tmp_path / "aligned.gguf"
    path.write_bytes(content)
    file = GGUF(path)
    assert list(file.tensors) == ["late", "early"]
    values = {
        name: file.data(info).view(np.float32).tolist() for name, info in file.tensors.items()
    }
    assert values == {"late": [2, 3], "early": [1]}


def header(tensors: int = 0, pairs: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor(name: str, ne: list[int], code: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, code, offset)


def pair(kind: str, *values: int) -> bytes:
    """A header with one pair "k", its type and value packed as given."""
    return header(pairs=1) + text("k") + struct.pack(kind, *values)


def one(name: str, ne: list[int], code: int = 0, offset: int = 0) -> bytes:
    """A header with one tensor."""
    return header(tensors=1) + tensor(name, ne, code, offset)


HOSTILE = {
    "empty": (b"", "is empty"),
    "wrong magic": (header(magic=b"GGML"), "is not a GGUF file"),
    "version 1": (header(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "only a magic": (b"GGUF", "ends in the middle"),
    "huge tensor count": (header(tensors=1 << 60), "more entries than it can hold"),
    "huge pair count": (header(pairs=1 << 62), "more entries than it can hold"),
    "a huge string": (
        header(pairs=1) + struct.pack("<Q", 1 << 63) + bytes(40), "ends in the middle"),
    "a huge array": (pair("<IIQ", 9, 4, 1 << 61), "ends in the middle"),
    "a huge array of strings": (
        pair("<IIQ", 9, 8, 1 << 61) + bytes(9), "ends in the middle"),
    "strings past the end": (
        pair("<IIQQ", 9, 8, 1, 1 << 62) + bytes(9), "ends in the middle"),
    "an unknown value type": (pair("<I", 99) + bytes(9), "unknown type 99"),
    "an array of arrays": (pair("<IIQ", 9, 9, 1), "unknown type 9"),
    "a key twice": (
        header(pairs=2) + (text("k") + struct.pack("<IB", 7, 1)) * 2 + bytes(8), "twice"),
    "a key that is not UTF-8": (
        header(pairs=1) + struct.pack("<Q", 1) + b"\xff" + bytes(8), "not UTF-8"),
    "an alignment of three": (
        header(pairs=1) + text("general.alignment") + struct.pack("<II", 4, 3), "power of two"),
    "a tensor outside": (one("t", [1 << 30]), "ends before its tensor t"),
    "sizes that overflow": (one("t", [1 << 62, 1 << 62]), "ends before its tensor t"),
    "an offset that overflows": (
        one("t", [1], offset=(1 << 64) - 32), "ends before its tensor t"),
    "an offset off its alignment": (one("t", [1], offset=4) + bytes(99), "off its alignment"),
    "two tensors on one spot": (
        header(tensors=2) + tensor("t", [9]) + tensor("u", [1], offset=32) + bytes(99), "one spot"),
    "more pairs than models have": (
        header(pairs=70_000) + bytes(1 << 20), "where 65536 of each can be read"),
    "an alignment of a gigabyte": (
        header(pairs=1) + text("general.alignment") + struct.pack("<II", 4, 1 << 30),
        "power of two"),
    "an alignment of many numbers": (
        header(pairs=1) + text("general.alignment") + struct.pack("<IIQII", 9, 4, 2, 32, 32),
        "power of two"),
    "more texts than vocabularies have": (
        pair("<IIQ", 9, 8, (1 << 22) + 1) + bytes(8 * ((1 << 22) + 2)), "more than 4194304 texts"),
    "a key of a megabyte": (
        header(pairs=1) + text("k" * (1 << 20)) + bytes(9), "a name that can be none, 'kkk"),
    "a key without a letter": (header(pairs=1) + text("") + bytes(9), "can be none, ''"),
    "a key that commands the terminal": (
        header(pairs=1) + text("\x1b[2J") + bytes(9), r"can be none, '\\x1b\[2J'"),
    "no dimensions": (one("t", []), "0 dimensions"),
    "a dimension below zero": (one("t", [(1 << 64) - 1]), "ends before its tensor t"),
    "no elements": (one("t", [0]), "0 columns"),
    "five dimensions": (one("t", [1] * 5), "5 dimensions"),
    "a name too long": (one("t" * 64, [1]), "dimensions"),
    "a withdrawn type": (one("t", [32], code=4), "withdrawn"),
    "half a block": (one("t", [33], code=8), "no multiple of 32"),
    "a tensor twice": (header(tensors=2) + tensor("t", [1]) * 2 + bytes(99), "twice"),
}  # fmt: skip


def test_a_header_that_has_no_end_is_refused_before_it_fills_the_memory(tmp_path: Path):
    path = tmp_path / "long.gguf"
    with open(path, "wb") as file:  # mostly a hole: it takes no disk
        file.write(pair("<IIQ", 9, 8, 1 << 20) + struct.pack("<Q", part.MAX_HEADER))
        file.truncate(part.MAX_HEADER + (64 << 20))
    with pytest.raises(keelback.InvalidFile, match="header of more than 128 MiB"):
        GGUF(path)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_or_hostile_header_gets_a_sentence(tmp_path: Path, case: str):
    content, said = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(keelback.InvalidFile, match=said) as caught:
        GGUF(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 300


def test_a_missing_file_and_a_folder_get_a_sentence(tmp_path: Path):
    with pytest.raises(keelback.InvalidFile, match="no such file"):
        GGUF(tmp_path / "missing.gguf")
    with pytest.raises(keelback.InvalidFile, match="is a folder"):
        GGUF(tmp_path)
    with pytest.raises(keelback.InvalidFile, match="File name too long"):
        GGUF(tmp_path / ("x" * 300))


def test_missing_keys_and_tensors_and_wrong_shapes_are_named(tiny_file, tmp_path: Path):
    source = tiny_file("mamba-tied", "f32").read_bytes()
    for old, new, said in (
        (b"mamba.ssm.state_size", b"mamba.ssm.state_sizf", "mamba.ssm.state_size"),
        (b"blk.1.ssm_out.weight", b"blk.1.ssm_ouT.weight", "lacks the tensor blk.1.ssm_out"),
        (b"blk.0.ssm_a", b"blk.0.ssm_b", "lacks the tensor blk.0.ssm_a"),
        (b"general.architecture", b"general.architecturE", "architecture 'None' is not known"),
    ):
        assert source.count(old) == 1
        path = tmp_path / "broken.gguf"
        path.write_bytes(source.replace(old, new))
        with pytest.raises(keelback.KeelbackError, match=said) as caught:
            keelback.load(path)
        assert str(path) in str(caught.value)
    key = b"mamba.embedding_length" + struct.pack("<I", 4)
    at = source.index(key) + len(key)
    path.write_bytes(source[:at] + struct.pack("<I", 48) + source[at + 4 :])
    with pytest.raises(keelback.InvalidFile, match=r"token_embd\.weight has the shape"):
        keelback.load(path)


def patched(
    tiny_file, tmp_path: Path, name: str, change: Callable[[str, np.ndarray], np.ndarray | None]
) -> Path:
    """A tiny model rewritten tensor by tensor; None leaves a tensor out."""
    source = GGUF(tiny_file(name, "f32"))

    def fill(writer: gguf.GGUFWriter) -> None:
        for key, value in source.metadata.items():
            if key != "general.architecture":
                add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
                add.get(type(value), writer.add_string)(key, value)
        for info in source.tensors.values():
            values = change(info.name, blocks.dequantize(source.data(info), info.block, info.shape))
            if values is not None:
                writer.add_tensor(info.name, np.ascontiguousarray(values))

    return write(tmp_path / "patched.gguf", fill, source.metadata["general.architecture"])


def retyped(source: GGUF, path: Path, name: str, block: blocks.BlockFormat) -> Path:
    """A copy of a model in which one tensor has another type, and any bytes."""
    tensors = []
    for info in source.tensors.values():
        kind, data = info.block, source.data(info).tobytes()
        if info.name == name:
            kind, size = block, math.prod(info.shape) // block.elements * block.nbytes
            data = np.random.RandomState(4).randint(0, 60, size, np.uint8).tobytes()
        tensors.append(NewTensor(info.name, info.shape, kind, len(data), partial(iter, [data])))
    write_file(path, source.metadata.entries, tensors, lambda done, total: None)
    return path


@pytest.mark.parametrize("block", blocks.BY_CODE.values(), ids=lambda block: block.name)
@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.0.ssm_in.weight"])
def test_a_weight_of_any_type_runs_or_is_refused_by_its_name(
    tiny_file, tmp_path: Path, name: str, block: blocks.BlockFormat
):
    source = GGUF(tiny_file("mamba-q8", "q4_0"))
    path = retyped(source, tmp_path / "retyped.gguf", name, block)
    for backend in ("cpu", "numpy"):
        try:
            model = Model(path, backend=backend, threads=1, notice=lambda text: None)
        except keelback.UnsupportedModel as error:
            assert f"tensor {name} has the type {block.name}, which cannot be" in str(error)
            assert not blocks.readable(block)
            continue
        assert blocks.readable(block)
        with contextlib.suppress(keelback.NumericalError):
            model.forward([1, 2, 3])


def test_whole_numbers_and_types_of_activations_are_no_weights():
    refused = {block.name for block in blocks.BY_CODE.values() if not blocks.readable(block)}
    assert refused >= {"I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}
    assert not refused & {"F64", "IQ1_M", "IQ4_XS", "MXFP4", "Q2_K", "TQ1_0"}


@pytest.mark.parametrize("shape", [(-1,), (1, -1), (-1, 1), (1, 1, -1)])
@pytest.mark.parametrize(
    "tensor_name", ["token_embd.weight", "blk.0.ssm_in.weight", "blk.0.ssm_conv1d.weight"]
)
def test_matrices_of_another_shape_are_refused_though_their_size_fits(
    tiny_file, tmp_path: Path, tensor_name: str, shape: tuple[int, ...]
):
    path = patched(
        tiny_file,
        tmp_path,
        "mamba-tied",
        lambda name, v: v.reshape(shape) if name == tensor_name else v,
    )
    with pytest.raises(keelback.InvalidFile, match=tensor_name):
        keelback.load(path)


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
@pytest.mark.parametrize("name", ["mamba-bias", "mamba2-bias", "gdn-gate"])
def test_vectors_may_have_dimensions_of_one(tiny_file, tmp_path: Path, name: str, backend: str):
    """As llama.cpp has them; a definition must not take such a vector for a column."""

    def spread(tensor: str, values: np.ndarray) -> np.ndarray:
        if tensor == "token_embd.weight":
            return values[:, None]
        return values.reshape(-1, 1) if values.ndim == 1 else values

    path = patched(tiny_file, tmp_path, name, spread)
    expected, _ = Model(tiny_file(name, "f32"), backend=backend).forward([1, 2, 3])
    logits, _ = Model(path, backend=backend).forward([1, 2, 3])
    assert (logits == expected).all()


def test_tensors_that_no_op_reads_are_refused(tiny_file, tmp_path: Path):
    source = tiny_file("mamba-tied", "f32").read_bytes()
    key = b"mamba.block_count" + struct.pack("<I", 4)
    at = source.index(key) + len(key)
    path = tmp_path / "short.gguf"
    path.write_bytes(source[:at] + struct.pack("<I", 1) + source[at + 4 :])
    with pytest.raises(keelback.InvalidFile, match="tensors that mamba has no use for"):
        keelback.load(path)
