"""`keelback quantize`: the bytes that are written, what is copied, and what is refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import modelfiles
import tiny
from keelback.cli import main
from keelback.convert import convert, encode
from keelback.convert.edit import split
from keelback.convert.encoders import encode as encode_rows
from keelback.convert.mixture import FILE_TYPES, Wishes, override
from keelback.convert.quantize import Quantization
from keelback.engine.model import Model
from keelback.kernels.errors import InvalidFile, InvalidInput
from keelback.kernels.formats import blocks, imatrix
from keelback.kernels.formats.blocks import BY_NAME, F16, F32
from keelback.kernels.formats.gguf import GGUF
from keelback.kernels.formats.gguf_writer import NewTensor, write_file
from keelback.kernels.formats.imatrix import Importance
from keelback.kernels.formats.metadata import Value

#: How far the values of a type lie from what they were, as a share of all of them.
ERRORS = {
    "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.05, "Q4_K": 0.1, "Q4_0": 0.12,
    "IQ4_NL": 0.1, "IQ4_XS": 0.1, "MXFP4": 0.2, "Q3_K": 0.2, "Q2_K": 0.4,
}  # fmt: skip
TYPES = [name for name in FILE_TYPES if name != "F32"]
EXPERTS, DENSE = "blk.0.ffn_up_exps.weight", "blk.0.ssm_in.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a recurrence, in F16."""
    path = tmp_path_factory.mktemp("source") / "gdn.gguf"
    modelfiles.write(path, modelfiles.gated_deltanet(256, 2, 2, 512, 97), "f16")
    return path


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    """A file with three experts and a matrix, in F32: no model, but weights."""
    return written(tmp_path / "stack.gguf", {EXPERTS: (3, 40, 256), DENSE: (24, 512)})


def written(path: Path, shapes: dict[str, tuple[int, ...]], fill: Any = None) -> Path:
    tensors = []
    for name, shape in shapes.items():
        values = np.random.default_rng(len(name)).standard_normal(shape, np.float32)
        if fill is not None:
            values.reshape(-1)[-1] = fill
        chunks = partial(iter, [values.tobytes()])
        tensors.append(NewTensor(name, shape, F32, values.nbytes, chunks))
    entries = {"general.architecture": Value.of("none", "str"), "a.b": Value.of([1, 2], "arr[u8]")}
    write_file(path, entries, tensors, lambda done, total: None)
    return path


def values_of(file: GGUF, name: str) -> np.ndarray:
    info = file.tensors[name]
    return blocks.dequantize(file.data(info), info.block, info.shape)


def content(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    file = GGUF(path)
    pairs = {key: value.encoded() for key, value in file.metadata.entries.items()}
    return pairs, {name: file.data(info).tobytes() for name, info in file.tensors.items()}


def quantized(source: Path, target: Path, kind: str, wishes: Wishes | None = None, **more: Any):
    threads = more.pop("threads", 2)
    return Quantization(source, kind, wishes or Wishes(), **more).write(target, threads)


# What is written.


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_written_and_runs(source: Path, tmp_path: Path, kind: str):
    work = Quantization(source, kind)
    path = work.write(tmp_path / "out.gguf")
    before, after = GGUF(source), GGUF(path)
    assert list(after.tensors) == list(before.tensors)
    assert path.stat().st_size - sum(i.nbytes for i in after.tensors.values()) < 20_000
    for change in work.changes:
        name, info = change.info.name, after.tensors[change.info.name]
        assert info.block is change.block and info.shape == change.info.shape
        if not change.is_encoded:
            assert np.array_equal(after.data(info), before.data(before.tensors[name])), name
            continue
        old, new = values_of(before, name), values_of(after, name)
        assert np.linalg.norm(new - old) < ERRORS[info.block.name] * np.linalg.norm(old), name
    row, _ = Model(path, threads=1, notice=lambda text: None).forward([1, 2])
    assert np.isfinite(row).all()


def test_keys_are_copied_and_say_what_was_done(stack: Path, tmp_path: Path):
    pairs, _ = content(quantized(stack, tmp_path / "out.gguf", "Q5_K_S"))
    old, _ = content(stack)
    assert {key: pairs.pop(key) for key in old} == old
    assert pairs == {
        "general.quantization_version": Value.of(2, "u32").encoded(),
        "general.file_type": Value.of(16, "u32").encoded(),
    }


def test_bytes_are_those_of_whole_tensors_whatever_the_portions(
    stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = {
        info.name: encode_rows(
            values_of(GGUF(stack), info.name).reshape(-1, info.shape[-1]), BY_NAME["Q4_K"]
        ).tobytes()
        for info in GGUF(stack).tensors.values()
    }
    for size, threads in ((1 << 20, 1), (4 * 256 * 7, 3), (1, 2)):
        monkeypatch.setattr(encode, "CHUNK_BYTES", size)
        path = quantized(stack, tmp_path / "out.gguf", "Q4_K_S", threads=threads)
        assert content(path)[1] == expected


def test_parts_are_read_and_become_one_file(source: Path, tmp_path: Path):
    parts = split(source, str(tmp_path / "part"), max_tensors=7)
    assert len(parts) > 2
    whole, joined = (
        quantized(path, tmp_path / f"{i}.gguf", "Q4_K_M")
        for i, path in enumerate((source, parts[0]))
    )
    assert whole.read_bytes() == joined.read_bytes()


@pytest.mark.parametrize("name", ["mamba-wide", "granite-wide", "granite-moe", "kimi-q8", "gdn-q8"])
@pytest.mark.parametrize("kind", ["q4_k_m", "q2_k", "mxfp4"])
def test_conversion_in_one_pass_writes_the_same_file(
    tiny_file: Callable, tmp_path: Path, name: str, kind: str
):
    checkpoint = tiny.write_checkpoint(name, tmp_path / name)
    direct = convert(checkpoint, tmp_path / "direct.gguf", kind.upper())
    assert content(direct) == content(
        quantized(tiny_file(name, "f32"), tmp_path / "later.gguf", kind)
    )


# Importance.


def importance(**changes: Any) -> Importance:
    rng = np.random.default_rng(5)
    sums = {EXPERTS: rng.random((3, 256), np.float32) ** 4, DENSE: rng.random((1, 512), np.float32)}
    counts = {EXPERTS: np.array([9, 0, 2], np.float32), DENSE: np.array([512], np.float32)}
    return Importance(sums | changes, counts, ["a.txt", "b.txt"], 7, 512)


def test_importance_weighs_each_expert_by_its_own_columns(stack: Path, tmp_path: Path):
    imatrix.write(tmp_path / "i.gguf", found := importance())
    path = quantized(stack, tmp_path / "out.gguf", "Q4_K_S", imatrix=tmp_path / "i.gguf")
    pairs, data = content(path)
    for name in (EXPERTS, DENSE):
        matrices = np.atleast_3d(values_of(GGUF(stack), name))
        matrices = matrices.reshape(len(found.sums[name]), -1, found.sums[name].shape[1])
        encoded = [
            encode_rows(matrix, BY_NAME["Q4_K"], weights).tobytes()
            for matrix, weights in zip(matrices, found.of(name), strict=True)
        ]
        assert data[name] == b"".join(encoded)
    without = content(quantized(stack, tmp_path / "without.gguf", "Q4_K_S"))[1]
    assert without[DENSE] != data[DENSE]
    said = {key: value for key, value in pairs.items() if key.startswith("quantize.imatrix.")}
    assert said == {
        "quantize.imatrix.file": Value.of("i.gguf", "str").encoded(),
        "quantize.imatrix.dataset": Value.of("a.txt", "str").encoded(),
        "quantize.imatrix.entries_count": Value.of(2, "u32").encoded(),
        "quantize.imatrix.chunks_count": Value.of(7, "u32").encoded(),
    }


@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (2, 256)])
def test_importance_of_another_model_is_refused(stack: Path, tmp_path: Path, shape):
    wrong = importance(**{EXPERTS: np.ones(shape, np.float32)})
    wrong.counts[EXPERTS] = np.ones(shape[0], np.float32)
    imatrix.write(tmp_path / "i.gguf", wrong)
    with pytest.raises(InvalidInput, match=f"{EXPERTS} as {shape[0]} x {shape[1]} columns"):
        quantized(stack, tmp_path / "out.gguf", "Q4_K_S", imatrix=tmp_path / "i.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_what_has_no_importance_is_told_once(stack: Path, tmp_path: Path):
    found = importance()
    del found.sums[DENSE], found.counts[DENSE]
    imatrix.write(tmp_path / "i.gguf", found)
    told: list[str] = []
    work = Quantization(stack, "Q4_K_S", imatrix=tmp_path / "i.gguf")
    work.write(tmp_path / "out.gguf", notice=told.append)
    (sentence,) = [text for text in told if "compiling" not in text]
    assert f"no entry for 1 of the tensors, {DENSE} among them" in sentence


def test_conversion_takes_an_importance_matrix(tiny_file: Callable, tmp_path: Path):
    checkpoint = tiny.write_checkpoint("mamba-wide", tmp_path / "mamba-wide")
    wide = GGUF(tiny_file("mamba-wide", "f32")).tensors["blk.0.ssm_in.weight"].shape[1]
    weights = np.random.default_rng(1).random((1, wide), np.float32)
    found = Importance({"blk.0.ssm_in.weight": weights}, {"blk.0.ssm_in.weight": np.ones(1)})
    imatrix.write(path := tmp_path / "i.gguf", found)
    direct = convert(checkpoint, tmp_path / "direct.gguf", "q4_0", imatrix=path)
    later = quantized(tiny_file("mamba-wide", "f32"), tmp_path / "later.gguf", "q4_0", imatrix=path)
    assert content(direct) == content(later)


# What is refused, and what is left behind.


def test_a_file_is_not_written_over_itself(stack: Path, tmp_path: Path):
    (tmp_path / "soft.gguf").symlink_to(stack)
    os.link(stack, tmp_path / "hard.gguf")
    before = stack.read_bytes()
    for target in (stack, tmp_path / "soft.gguf", tmp_path / "hard.gguf"):
        with pytest.raises(InvalidInput, match="name another file to write"):
            quantized(stack, target, "Q8_0")
    imatrix.write(tmp_path / "i.gguf", importance())
    with pytest.raises(InvalidInput, match="name another file to write"):
        quantized(stack, tmp_path / "i.gguf", "Q8_0", imatrix=tmp_path / "i.gguf")
    assert stack.read_bytes() == before


def test_rounding_twice_has_to_be_allowed(source: Path, tmp_path: Path):
    once = quantized(source, tmp_path / "once.gguf", "Q8_0")
    with pytest.raises(InvalidInput, match=r"as Q8_0.*--allow-requantize"):
        Quantization(once, "Q4_K_M")
    twice = quantized(once, tmp_path / "twice.gguf", "Q4_K_M", allow_requantize=True)
    assert GGUF(twice).tensors["blk.0.ffn_up.weight"].block.name == "Q4_K"
    # Nothing is rounded twice where types stay.
    again = Quantization(once, "Q8_0")
    assert not any(change.is_encoded for change in again.changes)


@pytest.mark.parametrize(
    ("kind", "fill", "sentence"),
    [
        ("Q4_K_S", np.nan, f"{DENSE} are not finite"),
        ("Q8_0", -np.inf, f"{DENSE} are not finite"),
        ("F16", 1e6, f"{DENSE} is too large for F16"),
        ("Q8_0", -1e30, f"{DENSE} is too large for Q8_0"),
        ("Q4_K_S", 1e30, f"{DENSE} is too large for Q4_K"),
        ("F32", np.nan, f"{DENSE} are not finite"),
    ],
)
def test_values_that_cannot_be_written_leave_nothing(tmp_path: Path, kind, fill, sentence):
    path = written(tmp_path / "in.gguf", {DENSE: (24, 512)}, fill)
    with pytest.raises(InvalidFile, match=sentence):
        quantized(path, tmp_path / "out.gguf", kind)
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_what_was_there(stack: Path, tmp_path: Path):
    (tmp_path / "out.gguf").write_bytes(b"old")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Quantization(stack, "Q4_K_S").write(tmp_path / "out.gguf", 2, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "stack.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform != "linux", reason="measures resident memory as Linux counts it")
def test_a_large_file_passes_through_little_memory(tmp_path: Path):
    path, size = tmp_path / "in.gguf", (16384, 4096)
    nbytes = 2 * size[0] * size[1]
    zeros = [memoryview(bytes(1 << 20))] * (nbytes >> 20)
    tensor = NewTensor(DENSE, size, F16, nbytes, partial(iter, zeros))
    write_file(path, {}, [tensor], lambda done, total: None)
    seen: list[int] = []
    Quantization(path, "Q8_0").write(
        tmp_path / "out.gguf", 2, progress=lambda done, total: seen.append(resident())
    )
    assert max(seen) - seen[0] < 40 << 20 < nbytes


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise AssertionError


# The command.


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, arguments)])


def test_the_command_says_sizes_and_bits(source: Path, tmp_path: Path):
    done = command(source, tmp_path / "out.gguf", "q4_k_m", "--tensor-type", "ffn_up=q8_0")
    assert done.exit_code == 0, done.output
    facts = Quantization(source, "Q4_K_M", Wishes(overrides=(override("ffn_up=q8_0"),))).facts()
    last = done.stdout.splitlines()[-1]
    assert f"{facts['bits_per_weight']:.2f} bits per weight" in last and "Q4_K_M" in last
    written = GGUF(tmp_path / "out.gguf").tensors
    assert facts["bytes"] == sum(info.nbytes for info in written.values())
    assert written["blk.0.ffn_up.weight"].block.name == "Q8_0"


def test_a_dry_run_shows_every_tensor_and_writes_nothing(source: Path, tmp_path: Path):
    out = tmp_path / "out.gguf"
    lines = command(source, out, "Q4_K_M", "--dry-run", "--plain").stdout.splitlines()
    assert len(lines) == len(GGUF(source).tensors) + 1
    assert any("blk.0.ssm_alpha.weight" in line and "Q4_K" in line for line in lines)
    facts = json.loads(command(source, out, "Q4_K_M", "--dry-run", "--json").stdout)
    alpha = next(t for t in facts["tensors"] if t["name"] == "blk.0.ssm_alpha.weight")
    assert (alpha["type_before"], alpha["type"]) == ("F16", "Q8_0")
    assert facts["type"] == "Q4_K_M" and facts["bytes"] < facts["bytes_before"]
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("Q4_K_XL",), "cannot be written; choose one of"),
        (("Q9",), "Q4_K is Q4_K_M"),
        (("Q4_0", "--tensor-type", "attn"), "PATTERN=TYPE"),
        (("Q4_0", "--output-tensor-type", "q9"), "cannot be written as 'q9'"),
        (("Q4_0", "--tensor-type", "ssm_inn=q8_0"), "has no matrix in whose name 'ssm_inn'"),
        (("Q4_0", "--output-tensor-type", "f16", "--leave-output-tensor"), "leave one out"),
        (("Q4_0", "--imatrix", "missing.gguf"), "missing.gguf: there is no such file"),
        (("Q4_0", "-t", "9999"), "thread"),
    ],
)
def test_wrong_arguments_get_a_sentence(source: Path, tmp_path: Path, arguments, sentence):
    done = command(source, tmp_path / "out.gguf", *arguments)
    assert done.exit_code == 1 and sentence in done.output
    assert not list(tmp_path.iterdir())
