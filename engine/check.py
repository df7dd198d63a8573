"""Reads a model file to its end and says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .. import models
from ..kernels.errors import InvalidFile, KeelbackError
from ..kernels.formats.blocks import BlockFormat
from ..kernels.formats.finite import not_finite
from ..kernels.formats.gguf import GGUF
from .info import open_file, tokenizer_of

#: Bytes, about, that are read at once: they stay in the processor's cache.
CHUNK_BYTES = 256 << 10


def check_all(
    paths: Iterable[str], progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """`check` of each; the other parts of a model whose first one is given are checked with that.

    `progress` is told a path and its bytes.
    """
    found = [check(path, partial(progress, path)) for path in paths]
    others = {part for facts in found for part in facts["parts"][1:]}
    return [facts for facts in found if str(Path(facts["file"])) not in others]


def check(path: str | Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Facts about a model file, ready for JSON: `problems` has a sentence for each thing wrong.

    All parts are opened, the graph and the tokenizer are built, and every tensor is read for values
    and scales that are NaN or infinite; nothing may follow the last. `progress` is told bytes.
    """
    facts: dict[str, Any] = dict(file=str(path), parts=[], tensors=0, bytes=0, problems=[])
    try:
        file = open_file(path)
        facts |= {"tensors": len(file.tensors), "bytes": file.nbytes}
        facts["parts"] = [str(part.path) for part in file.parts]
        try:
            graph = models.build(file.metadata, file.tensors, file.path)
            tokenizer_of(file, graph.logits.width if graph.logits else 0)
        except KeelbackError as error:
            facts["problems"].append(str(error))
        facts["problems"] += [*_left_over(file), *_not_finite(file, progress)]
    except InvalidFile as error:
        facts["problems"].append(str(error))
    return facts


def _left_over(file: GGUF) -> Iterator[str]:
    for part in file.parts:
        ends = [info.offset + info.nbytes for info in part.tensors.values()]
        end = -(-max(ends, default=part.data_start) // part.alignment) * part.alignment
        if len(part.map) > end:
            yield (
                f"{part.path}: {len(part.map) - end} bytes follow the last tensor, where nothing "
                "should be; download or convert it again"
            )


def _not_finite(file: GGUF, progress: Callable[[int, int], None]) -> list[str]:
    problems, done = [], 0
    total = sum(info.nbytes for info in file.tensors.values())
    for info in file.tensors.values():
        nan, infinite, step = 0, 0, _whole_blocks(info.block)
        for chunk in file.chunks(info, step):
            found = not_finite(chunk, info.block)
            nan, infinite, done = nan + found[0], infinite + found[1], done + len(chunk)
            progress(done, total)
        if nan or infinite:
            what = "values" if info.block.elements == 1 else "scales"
            problems.append(
                f"{file.parts[info.part].path}: {nan} {what} of the tensor {info.name} "
                f"({info.block.name}) are NaN and {infinite} infinite; download or convert it again"
            )
    return problems


def _whole_blocks(block: BlockFormat) -> int:
    return max(1, CHUNK_BYTES // block.nbytes) * block.nbytes
