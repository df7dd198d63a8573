"""The types of tensors, as llama.cpp's quantizer chooses them, for every architecture it knows.

It is asked about files with the names and dimensions of a tiny checkpoint's tensors, of more layers
and of shapes that bring out all rules: what a file of that shape would compute, it does not check.
"""

from __future__ import annotations

import ctypes
import re
import zlib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llamafiles
import tiny
from exchanged import TINY
from keelback.convert.mixture import FILE_TYPES, Wishes, override
from keelback.convert.quantize import Quantization
from keelback.kernels.formats import imatrix
from keelback.kernels.formats.blocks import BY_NAME, F32
from keelback.kernels.formats.gguf import GGUF
from keelback.kernels.formats.gguf_writer import NewTensor, write_file
from keelback.kernels.formats.imatrix import Importance
from keelback.kernels.formats.metadata import Value
from llamafiles import Files, llama_cpp

LAYERS = 19
#: Lengths of rows: of whole superblocks, of whole blocks, and of neither.
WIDTHS = (256, 512, 256, 160, 48)
TYPES = [name for name in FILE_TYPES if name != "F32"]
PLAIN = Wishes(plain=True)
ONE = np.ones((1, 1), np.float32)


def architectures() -> dict[str, str]:
    """A tiny checkpoint of every architecture."""
    found: dict[str, str] = {}
    for name in TINY:
        found.setdefault(tiny.VARIANTS[name].model_type, name)
    return found


ARCHITECTURES = architectures()
CHECKPOINTS = tuple(ARCHITECTURES.values())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    with llamafiles.exchange(tmp_path_factory.mktemp("mixture")) as files:
        yield files


@pytest.fixture(scope="module")
def stretched(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(checkpoint, experts, queries to a key) -> a file of LAYERS layers; 0: its own figures."""
    folder = tmp_path_factory.mktemp("stretched")

    @cache
    def make(name: str, experts: int = 0, queries: int = 0) -> Path:
        source = GGUF(files.ours(name))
        entries = deepened(source, experts, queries)
        shapes = {}
        for layer in range(LAYERS):
            for info in source.tensors.values():
                shapes[again(info.name, layer, source)] = info.shape
        return write(folder / f"{name}-{experts}-{queries}.gguf", entries, shapes)

    return make


def again(name: str, layer: int, source: GGUF) -> str:
    """A tensor's name in a layer that repeats one of the file's."""
    block = re.match(r"blk\.(\d+)\.(.*)", name)
    count = source.metadata[f"{source.metadata['general.architecture']}.block_count"]
    if block is None or layer % count != int(block[1]):
        return name
    return f"blk.{layer}.{block[2]}"


def deepened(source: GGUF, experts: int, queries: int) -> dict[str, Value]:
    """A file's pairs for LAYERS layers."""
    entries = dict(source.metadata.entries)
    prefix = source.metadata["general.architecture"]
    count = source.metadata[f"{prefix}.block_count"]
    for key, value in entries.items():
        each = value.count == count and not key.endswith("dimension_sections")
        if key.startswith(prefix) and each:
            once = value.decode()
            entries[key] = Value.of([once[i % count] for i in range(LAYERS)], value.kind)
    entries[f"{prefix}.block_count"] = Value.of(LAYERS, "u32")
    if experts:
        entries[f"{prefix}.expert_count"] = Value.of(experts, "u32")
        entries[f"{prefix}.expert_used_count"] = Value.of(2, "u32")
    if queries:
        entries[f"{prefix}.attention.head_count"] = Value.of(2 * queries, "u32")
        entries[f"{prefix}.attention.head_count_kv"] = Value.of(2, "u32")
    return entries


def write(path: Path, entries: dict[str, Value], shapes: dict[str, tuple[int, ...]]) -> Path:
    tensors = []
    for name, shape in shapes.items():
        # Every kind of matrix gets rows of one length, and few of them.
        role = re.sub(r"blk\.\d+\.", "", name)
        width = WIDTHS[zlib.crc32(role.encode()) % len(WIDTHS)]
        if len(shape) > 1 and shape[-1] > 1:
            shape = (*(min(n, 3) for n in shape[:-1]), width)
        values = np.random.default_rng(len(tensors)).standard_normal(shape, np.float32)
        chunks = partial(iter, [values.tobytes()])
        tensors.append(NewTensor(name, shape, F32, values.nbytes, chunks))
    write_file(path, entries, tensors, lambda done, total: None)
    return path


def theirs(
    source: Path, target: Path, kind: str, informed: bool = False, **wishes: Any
) -> dict[str, str]:
    """Types of the tensors of a file that llama.cpp's quantizer writes."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[kind].code, 1
    nothing = (ctypes.c_float * 1)(1.0)
    entries = (llama_cpp.llama_model_imatrix_data * 2)()
    entries[0].name, entries[0].data, entries[0].size = b"none", nothing, 1
    if informed:
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    overrides = wishes.pop("overrides", [])
    patterns = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
    for i, (pattern, block) in enumerate(overrides):
        patterns[i].pattern, patterns[i].type = pattern.encode(), BY_NAME[block].code
    if overrides:
        params.tt_overrides = ctypes.cast(patterns, type(params.tt_overrides))
    for field, value in wishes.items():
        setattr(params, field, value)
    paths = str(source).encode(), str(target).encode()
    llamafiles.log.clear()
    done = llama_cpp.llama_model_quantize(*paths, ctypes.byref(params))
    assert done == 0, "".join(llamafiles.log[-3:])
    return {info.name: info.block.name for info in GGUF(target).tensors.values()}


def ours(
    source: Path, kind: str, wishes: Wishes = PLAIN, weighing: Path | None = None
) -> dict[str, str]:
    changes = Quantization(source, kind, wishes, weighing).changes
    return {change.info.name: change.block.name for change in changes}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_plain_mixtures_are_llamacpps(stretched: Any, tmp_path: Path, name: str, kind: str) -> None:
    assert ours(stretched(name), kind) == theirs(stretched(name), tmp_path / "x.gguf", kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("model", ["granitemoehybrid", "qwen3_next", "jamba"])
@pytest.mark.parametrize(("experts", "queries"), [(0, 8), (8, 0), (8, 4)])
def test_experts_and_shared_keys_count_alike(
    stretched: Any, tmp_path: Path, model: str, kind: str, experts: int, queries: int
) -> None:
    source = stretched(ARCHITECTURES[model], experts, queries)
    assert ours(source, kind) == theirs(source, tmp_path / "x.gguf", kind)


@pytest.mark.parametrize("kind", TYPES)
def test_an_importance_matrix_changes_the_same_tensors(
    stretched: Any, tmp_path: Path, kind: str
) -> None:
    # That there is one counts, not what it holds.
    imatrix.write(weighing := tmp_path / "i.gguf", Importance({"none": ONE}, {"none": ONE[0]}))
    for name in CHECKPOINTS:
        got = ours(stretched(name), kind, weighing=weighing)
        assert got == theirs(stretched(name), tmp_path / "x.gguf", kind, informed=True), name


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_0", "IQ4_XS", "MXFP4_MOE"])
@pytest.mark.parametrize(
    ("mine", "their"),
    [
        ({"pure": True}, {"pure": True}),
        ({"leave_output": True}, {"quantize_output_tensor": False}),
        ({"output": BY_NAME["Q5_0"]}, {"output_tensor_type": BY_NAME["Q5_0"].code}),
        ({"embedding": BY_NAME["Q2_K"]}, {"token_embedding_type": BY_NAME["Q2_K"].code}),
        (
            {
                "overrides": (
                    override(r"(attn_(q|k)|ssm_out)\.=q5_k"),
                    override("blk.[0-4]..*=Q3_K"),
                )
            },
            {"overrides": [(r"(attn_(q|k)|ssm_out)\.", "Q5_K"), ("blk.[0-4]..*", "Q3_K")]},
        ),
    ],
)
def test_wishes_are_understood_alike(
    stretched: Any, tmp_path: Path, kind: str, mine: dict[str, Any], their: dict[str, Any]
) -> None:
    for name in CHECKPOINTS:
        source = stretched(name)
        got = ours(source, kind, Wishes(plain=True, **mine))
        assert got == theirs(source, tmp_path / "x.gguf", kind, **their), name
