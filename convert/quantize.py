"""`keelback quantize`: a GGUF's matrices in smaller types, everything else as it was.

A few megabytes at a time are read, encoded in threads and written beside the target, which the file
becomes at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile, InvalidInput
from ..kernels.files import check_target, replacing
from ..kernels.formats import blocks
from ..kernels.formats.blocks import BlockFormat
from ..kernels.formats.finite import not_finite
from ..kernels.formats.gguf import GGUF
from ..kernels.formats.gguf_writer import NewTensor, Progress, write_file
from ..kernels.formats.metadata import Value
from ..kernels.formats.part import TensorInfo
from .ahead import Ahead, Task
from .edit import without_split
from .encode import CHUNK_BYTES, encoded, size_of, spans
from .encoders import prepare
from .importance import Weighing
from .mixture import (
    NO_WISHES,
    FileType,
    Traits,
    Weight,
    Wishes,
    file_type,
    is_quantizable,
    is_rounded,
    override,
    tensor_type,
    types_of,
)
from .write import QUANTIZATION_VERSION


def wishes(options: Mapping[str, Any]) -> Wishes:
    """The command line's options; raises InvalidInput for what they cannot mean."""
    output, embedding = options["output"], options["embedding"]
    if output is not None and options["leave_output_tensor"]:
        raise InvalidInput(
            "--output-tensor-type and --leave-output-tensor contradict each other; leave one out"
        )
    return Wishes(
        overrides=tuple(override(text) for text in options["overrides"]),
        output=None if output is None else tensor_type(output),
        embedding=None if embedding is None else tensor_type(embedding),
        leave_output=options["leave_output_tensor"],
        pure=options["pure"],
        plain=options["plain"],
    )


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor and the type it gets."""

    info: TensorInfo
    block: BlockFormat

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in that type."""
        return size_of(self.info.shape, self.block)

    @property
    def is_encoded(self) -> bool:
        """Whether the tensor's type changes; its bytes are copied where it does not."""
        return self.block is not self.info.block


class Quantization:
    """What a file becomes: `changes`, tensor by tensor in the file's order, and its `kind`."""

    def __init__(
        self,
        path: str | Path,
        kind: str,
        wanted: Wishes = NO_WISHES,
        imatrix: str | Path | None = None,
        allow_requantize: bool = False,
    ) -> None:
        """Raises InvalidFile or InvalidInput for what cannot be read, or done as it is wished."""
        self.kind: FileType = file_type(kind)
        self.file = GGUF(path)
        self._weighing = None if imatrix is None else Weighing(imatrix)
        infos = self.file.tensors.values()
        weights = [Weight(i.name, i.shape, i.block) for i in infos if blocks.readable(i.block)]
        wanted = replace(wanted, importance=imatrix is not None)
        for pattern, _ in wanted.overrides:
            if not any(pattern.search(weight.name) for weight in weights if is_quantizable(weight)):
                raise InvalidInput(
                    f"{path} has no matrix in whose name {pattern.pattern[:80]!r} is found "
                    "(--tensor-type); `keelback info` lists the names"
                )
        types = types_of(weights, self.kind, Traits.of(self.file.metadata), wanted)
        self.changes = [Change(info, types.get(info.name, info.block)) for info in infos]
        self._rounded = [c for c in self.changes if c.is_encoded and is_rounded(c.block)]
        self._columns: dict[str, np.ndarray] | None = None
        twice = [c.info for c in self.changes if c.is_encoded and is_rounded(c.info.block)]
        if twice and not allow_requantize:
            raise InvalidInput(
                f"{path} holds {twice[0].name} as {twice[0].block.name}, and what is rounded twice "
                "loses more; take an F16, BF16 or F32 file, or add --allow-requantize"
            )

    def check(self, target: str | Path, *sources: str | Path | None) -> None:
        """Raise InvalidInput where `target` cannot be written, or is read; so are `sources`."""
        weighing = [] if self._weighing is None else [self._weighing.path]
        check_target(target, [*(part.path for part in self.file.parts), *weighing, *sources])

    def write(
        self,
        target: str | Path,
        threads: int | None = None,
        notice: Callable[[str], None] = lambda text: None,
        progress: Progress = lambda done, total: None,
    ) -> Path:
        """Write the file and return its path; `progress` is told the bytes done and in all.

        `notice` is told what is done otherwise than was wished. Raises InvalidInput where it cannot
        be written, InvalidFile for values that are not finite or too large for their type; a file
        that was there before then stays as it is.
        """
        self.check(target)
        path = Path(target)
        importance = self._importance(notice)
        prepare({change.block for change in self.changes if change.is_encoded}, notice)
        work = [
            partial(_tasks, self.file, change, importance.get(change.info.name))
            for change in self.changes
        ]
        with replacing(path) as partial_path, Ahead(work, threads) as made:
            tensors = [
                NewTensor(change.info.name, change.info.shape, change.block, change.nbytes, pieces)
                for change, pieces in zip(self.changes, made, strict=True)
            ]
            write_file(partial_path, self._entries(), tensors, progress)
        return path

    def facts(self) -> dict[str, Any]:
        """What becomes of the file: sizes, bits per weight, and each tensor."""
        before = sum(change.info.nbytes for change in self.changes)
        after = sum(change.nbytes for change in self.changes)
        weights = max(1, sum(math.prod(change.info.shape) for change in self.changes))
        return {
            "file": str(self.file.path),
            "type": self.kind.name,
            "bytes_before": before,
            "bytes": after,
            "bits_per_weight_before": 8 * before / weights,
            "bits_per_weight": 8 * after / weights,
            "tensors": [
                {
                    "name": change.info.name,
                    "shape": list(change.info.shape),
                    "type_before": change.info.block.name,
                    "type": change.block.name,
                    "bytes_before": change.info.nbytes,
                    "bytes": change.nbytes,
                }
                for change in self.changes
            ],
        }

    def roundings(
        self, notice: Callable[[str], None]
    ) -> list[tuple[str, str, int, Callable[[], tuple[np.ndarray, float]]]]:
        """Of each tensor that is rounded: its name, type and bytes to be, and what rounds it.

        That returns the tensor's bytes (uint8) in the type that it has, with the values that the
        new one leaves, and their relative L2 error. Raises InvalidInput where a tensor is rounded
        already, which what was lost cannot be told from.
        """
        importance = self._importance(notice)
        rounded = self._rounded
        for change in rounded:
            if is_rounded(change.info.block):
                raise InvalidInput(
                    f"{self.file.path} holds {change.info.name} as {change.info.block.name}; a "
                    "report needs an F16, BF16 or F32 file"
                )
        prepare({change.block for change in rounded}, notice)
        return [
            (
                change.info.name,
                change.block.name,
                change.nbytes,
                partial(_rounded, self.file, change, importance.get(change.info.name)),
            )
            for change in rounded
        ]

    def _importance(self, notice: Callable[[str], None]) -> dict[str, np.ndarray]:
        """What columns weigh, found once: a report and the file go by the same."""
        if self._weighing is not None and self._columns is None:
            infos = [change.info for change in self._rounded]
            self._columns = self._weighing.of(((i.name, i.shape) for i in infos), notice)
        return self._columns or {}

    def _entries(self) -> dict[str, Value]:
        """The pairs of the file, those of other parts left out, with what is new."""
        return {
            **without_split(self.file),
            "general.quantization_version": Value.of(QUANTIZATION_VERSION, "u32"),
            "general.file_type": Value.of(self.kind.code, "u32"),
            **({} if self._weighing is None else self._weighing.pairs()),
        }


def _tasks(file: GGUF, change: Change, importance: np.ndarray | None) -> Iterator[Task]:
    """What makes the bytes of a tensor, piece by piece."""
    info = change.info
    if not change.is_encoded:
        step = max(1, CHUNK_BYTES // info.block.nbytes) * info.block.nbytes
        for start in range(0, info.nbytes, step):
            yield partial(_copied, file, info, start, min(step, info.nbytes - start))
        return
    rows, width = math.prod(info.shape[:-1]), info.shape[-1]
    for first, count in spans(rows, width):
        yield partial(_encoded, file, change, importance, first, count)


def _copied(file: GGUF, info: TensorInfo, start: int, nbytes: int) -> memoryview:
    data = file.read(info, start, nbytes)
    if any(not_finite(data, info.block)):
        raise InvalidFile(
            f"the values of {info.name} are not finite; the file is damaged, or the training failed"
        )
    return data


def _rounded(file: GGUF, change: Change, importance: np.ndarray | None) -> tuple[np.ndarray, float]:
    info, width = change.info, change.info.shape[-1]
    row_bytes, off, norm = info.block.row_bytes(width), 0.0, 0.0
    result = np.empty(info.nbytes, np.uint8)
    for first, count in spans(math.prod(info.shape[:-1]), width):
        span = slice(first * row_bytes, (first + count) * row_bytes)
        data = np.frombuffer(_encoded(file, change, importance, first, count), np.uint8)
        values = blocks.dequantize(data, change.block, (count, width))
        result[span] = blocks.quantize(values, info.block).reshape(-1)
        exact = blocks.dequantize(file.data(info)[span], info.block, (count, width))
        off += float(np.square(values - exact, dtype=np.float64).sum())
        norm += float(np.square(exact, dtype=np.float64).sum())
    return result, math.sqrt(off / norm) if norm else 0.0


def _encoded(
    file: GGUF, change: Change, importance: np.ndarray | None, first: int, count: int
) -> memoryview:
    info = change.info
    width, row_bytes = info.shape[-1], info.block.row_bytes(info.shape[-1])
    data = file.read(info, first * row_bytes, count * row_bytes)
    values = blocks.dequantize(np.frombuffer(data, np.uint8), info.block, (count, width))
    rows = math.prod(info.shape[-2:-1])
    return encoded(info.name, values, change.block, importance, first, rows)
