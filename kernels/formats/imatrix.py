"""llama.cpp's imatrix files: how large the inputs of each weight matrix were over some text.

Source: llama.cpp's tools/imatrix. The file is a GGUF without a model: of every matrix the sums of
its inputs' squares, column by column, and how many inputs were summed; of expert tensors once for
each expert. Other tensors beside them, statistics of newer versions, are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidFile, InvalidInput
from ..files import replacing
from .blocks import F32
from .gguf_writer import NewTensor, write_file
from .metadata import Value
from .part import MAGIC, MAX_NAME, Part

SUMS, COUNTS = ".in_sum2", ".counts"
_TYPE, _DATASETS = "general.type", "imatrix.datasets"
_CHUNKS, _CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"

#: What the first bytes of a file of llama.cpp's former format say at most.
_LEGACY_ENTRIES, _LEGACY_NAME = 1 << 16, 256


@dataclass(slots=True)
class Importance:
    """What was seen of the inputs of weight matrices.

    sums      tensor's name -> float32 (matrices, width), sums of the squares of its inputs
    counts    tensor's name -> float32 (matrices,), how many inputs were summed
    datasets  the files that were read, in `chunks` pieces of `chunk_size` tokens
    """

    sums: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    chunks: int = 0
    chunk_size: int = 0

    def of(self, name: str) -> np.ndarray:
        """The mean squares of a tensor's inputs: float32 (matrices, width).

        Ones for an expert that was never asked: about it nothing is known. Raises KeyError for a
        tensor without an entry.
        """
        counts = self.counts[name][:, None]
        seen = counts > 0
        return np.where(seen, self.sums[name] / np.where(seen, counts, 1), np.float32(1))

    def add(self, more: Importance, path: str | Path) -> None:
        """Add what a file held; raises InvalidInput where that is of another model."""
        for name, sums in more.sums.items():
            mine, counts = self.sums.get(name), self.counts.get(name)
            if mine is None or counts is None:
                self.sums[name], self.counts[name] = sums, more.counts[name]
            elif mine.shape == sums.shape:
                self.sums[name], self.counts[name] = mine + sums, counts + more.counts[name]
            else:
                shapes = " and not ".join(f"{n} x {width}" for n, width in (sums.shape, mine.shape))
                raise InvalidInput(
                    f"{path} knows {name} as {shapes} columns as the others do; add up importance "
                    "matrices of one model"
                )
        self.datasets += [text for text in more.datasets if text not in self.datasets]
        self.chunk_size = self.chunk_size or more.chunk_size
        # Chunks of another size count for as many tokens as they have.
        self.chunks += round(more.chunks * more.chunk_size / max(1, self.chunk_size))


def read(path: str | Path) -> Importance:
    """Read a file; raises InvalidFile when it is none, or contradicts itself."""
    _refuse_legacy(Path(path))
    file = Part(path)
    if file.metadata.get(_TYPE) != "imatrix":
        raise InvalidFile(
            f"{path} is a GGUF but holds no importance matrix; make one with keelback imatrix"
        )
    names = {
        name.removesuffix(suffix)
        for name in file.tensors
        for suffix in (SUMS, COUNTS)
        if name.endswith(suffix)
    }
    if not names:
        raise InvalidFile(f"{path} holds no entry of an importance matrix; make it anew")
    found = Importance(
        datasets=_datasets(file),
        chunks=_number(file, _CHUNKS),
        chunk_size=_number(file, _CHUNK_SIZE),
    )
    for name in sorted(names):
        sums, counts = _values(file, name + SUMS), _values(file, name + COUNTS).reshape(-1)
        matrices = sums.reshape(-1, sums.shape[-1])
        if (counts % 1).any():
            raise file.broken(f"holds counts for {name} that are no whole numbers")
        if len(counts) != len(matrices):
            raise file.broken(
                f"holds {len(counts)} counts for the {len(matrices)} matrices of {name}"
            )
        found.sums[name], found.counts[name] = matrices, counts
    return found


def write(path: str | Path, importance: Importance) -> None:
    """Write a file, beside its target and renamed at the end, that llama.cpp reads too.

    Raises InvalidInput when it cannot be written, or when a tensor's name is too long for it.
    """
    entries = {
        _TYPE: Value.of("imatrix", "str"),
        _DATASETS: Value.of(importance.datasets, "arr[str]"),
        _CHUNKS: Value.of(importance.chunks, "u32"),
        _CHUNK_SIZE: Value.of(importance.chunk_size, "u32"),
    }
    tensors = []
    for name, sums in sorted(importance.sums.items()):
        if len((name + SUMS).encode()) > MAX_NAME:
            raise InvalidInput(
                f"the name {name} leaves no room for {SUMS}; shorten the tensor's name"
            )
        tensors.append(_new(name + SUMS, sums))
        tensors.append(_new(name + COUNTS, importance.counts[name][:, None]))
    with replacing(path) as partial_path:
        write_file(partial_path, entries, tensors, lambda done, total: None)


def _new(name: str, values: np.ndarray) -> NewTensor:
    """A tensor to write: (matrices, width), which llama.cpp stores without a dimension of 1."""
    data = np.ascontiguousarray(values, "<f4").tobytes()
    shape = values.shape if len(values) > 1 else values.shape[1:]
    return NewTensor(name, shape, F32, len(data), partial(iter, [data]))


def _values(file: Part, name: str) -> np.ndarray:
    """A tensor's numbers, float32 of its shape; they have to be finite and not below zero."""
    info = file.tensors.get(name)
    if info is None:
        raise file.broken(f"lacks the tensor {name}")
    if info.block is not F32:
        raise file.broken(f"holds {name} as {info.block.name}, not F32")
    raw = b"".join(map(bytes, file.chunks(info.offset, info.nbytes, max(info.nbytes, 1))))
    values = np.frombuffer(raw, "<f4").reshape(info.shape)
    if not np.isfinite(values).all() or (values < 0).any():
        raise file.broken(f"holds numbers in {name} that are below zero or not finite")
    return values


def _datasets(file: Part) -> list[str]:
    value: Any = file.metadata.get(_DATASETS, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        # An array without elements may have any type.
        if file.metadata.entries[_DATASETS].count == 0:
            return []
        raise file.broken(f"has a {_DATASETS} that is no list of texts")
    return value


def _number(file: Part, key: str) -> int:
    value = file.metadata.get(key, 0)
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise file.broken(f"has a {key} that is no count")
    return value


def _refuse_legacy(path: Path) -> None:
    """Refuse llama.cpp's former format: a number of entries, then a length and a tensor's name."""
    try:
        with open(path, "rb") as file:
            head = file.read(8 + _LEGACY_NAME)
    except OSError:
        return  # what is wrong, the reader of GGUF files says
    entries, length = (int.from_bytes(head[at : at + 4], "little") for at in (0, 4))
    name = head[8 : 8 + length]
    sensible = 0 < entries <= _LEGACY_ENTRIES and 0 < length <= _LEGACY_NAME
    text = len(name) == length and name.isascii() and name.decode().isprintable()
    if head[:4] != MAGIC and sensible and text:
        raise InvalidFile(
            f"{path} is an importance matrix in llama.cpp's former format; convert it with "
            f"llama-imatrix --in-file {path.name} -o {path.stem}.gguf"
        )
