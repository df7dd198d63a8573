"""A model's GGUF: one file, or parts that were split by llama.cpp's rule.

The parts of `name-00001-of-00003.gguf` are found by their names and numbered from 0 in `split.no`;
the first has all pairs. As in llama.cpp a model is given as its first part.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import InvalidFile
from .part import Part, TensorInfo

#: The pairs that say which part of a model a file is; kinds as llama.cpp writes them.
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_KINDS = {SPLIT_NO: "u16", SPLIT_COUNT: "u16", SPLIT_TENSORS: "i32"}


class GGUF:
    """An open model file: `metadata`, `tensors` by name, and `data(info)` for their bytes.

    Raises InvalidFile when a file cannot be opened, is no GGUF, is truncated, describes tensors
    that do not lie inside it, or where a part is missing or of another model.
    """

    def __init__(self, path: str | Path) -> None:
        self.parts = _open_parts(Part(path))
        self.path, self.metadata = self.parts[0].path, self.parts[0].metadata
        self.alignment = self.parts[0].alignment
        self.tensors: dict[str, TensorInfo] = {}
        for part in self.parts:
            for info in part.tensors.values():
                if info.name in self.tensors:
                    other = self.parts[self.tensors[info.name].part].path
                    raise part.broken(f"holds the tensor {info.name}, as {other} does")
                self.tensors[info.name] = info
        announced = _number(self.parts[0], SPLIT_TENSORS)
        if len(self.parts) > 1 and announced != len(self.tensors):
            raise self.parts[0].broken(
                f"announces {announced} tensors in {len(self.parts)} parts, which hold "
                f"{len(self.tensors)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(len(part.map) for part in self.parts)

    @property
    def headers(self) -> Iterator[memoryview]:
        """The bytes of each file that come before its tensors."""
        return (memoryview(part.map)[: part.data_start] for part in self.parts)

    def data(self, info: TensorInfo) -> np.ndarray:
        """The bytes of a tensor: uint8, read-only, a view of the map."""
        return np.frombuffer(self.parts[info.part].map, np.uint8, info.nbytes, info.offset)

    def chunks(self, info: TensorInfo, step: int) -> Iterator[memoryview]:
        """The bytes of a tensor, up to `step` at a time, read from disk; see `Part.chunks`."""
        return self.parts[info.part].chunks(info.offset, info.nbytes, step)

    def read(self, info: TensorInfo, start: int, nbytes: int) -> memoryview:
        """`nbytes` bytes of a tensor from `start` on, read from disk; see `Part.chunks`."""
        (data,) = self.parts[info.part].chunks(info.offset + start, nbytes, nbytes)
        return data

    def release(self, info: TensorInfo, start: int = 0, end: int | None = None) -> None:
        """Give back the memory of bytes `start` to `end` of a tensor, and of their neighbours.

        Whoever reads them again, waits a little.
        """
        last = info.nbytes if end is None else end
        self.parts[info.part].release(info.offset + start, info.offset + last)

    def release_all(self) -> None:
        """Give back the memory of all that has been read."""
        for part in self.parts:
            part.release(0, len(part.map))


def part_name(prefix: str, index: int, count: int) -> str:
    """llama.cpp's name for a part; `index` counts from 0, the name from 1."""
    return f"{prefix}-{index + 1:05d}-of-{count:05d}.gguf"


def _open_parts(first: Part) -> list[Part]:
    """The part that was given, and all others of its model."""
    count, index = _number(first, SPLIT_COUNT), _number(first, SPLIT_NO)
    if count is None or count < 2:
        return [first]
    if index is None or not 0 <= index < count:
        raise first.broken(f"calls itself part {index} of {count}, counted from 0")
    suffix = part_name("", index, count)
    if not first.path.name.endswith(suffix):
        raise InvalidFile(
            f"{first.path} is part {index + 1} of {count}, which its name has to say: let it end "
            f"in {suffix}, and those of the other parts alike"
        )
    prefix = first.path.name.removesuffix(suffix)
    if index:
        start = first.path.with_name(part_name(prefix, 0, count))
        raise InvalidFile(f"{first.path} is part {index + 1} of {count}; name the first, {start}")
    return [first, *(_open_other(first, prefix, i, count) for i in range(1, count))]


def _open_other(first: Part, prefix: str, index: int, count: int) -> Part:
    path = first.path.with_name(part_name(prefix, index, count))
    if not path.exists():
        raise InvalidFile(f"{path} is missing, one of {count} parts; download it as well")
    part, total = Part(path, index), _number(first, SPLIT_TENSORS)
    for key, wanted in ((SPLIT_NO, index), (SPLIT_COUNT, count), (SPLIT_TENSORS, total)):
        if _number(part, key) != wanted:
            raise InvalidFile(
                f"{path} does not belong to {first.path}: its {key} is {_number(part, key)}, not "
                f"{wanted}; download both again"
            )
    return part


def _number(part: Part, key: str) -> int | None:
    value = part.metadata.get(key)
    return value if type(value) is int else None
