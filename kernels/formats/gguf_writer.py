"""Writing GGUF: the header at once, then tensor by tensor what their sources deliver.

Source: the GGUF specification, version 3. Tensors lie one after another in the order of their
descriptions, each padded to the alignment, as llama.cpp demands.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidInput
from ..files import check_space
from .blocks import BlockFormat
from .metadata import ALIGNMENT_KEY, Value, alignment_of, packed_text
from .part import MAGIC

VERSION = 3

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write: `shape` slowest dimension first.

    chunks  gives its bytes, in pieces that add up to `nbytes`, when it is its turn
    """

    name: str
    shape: tuple[int, ...]
    block: BlockFormat
    nbytes: int
    chunks: Callable[[], Iterable[bytes | memoryview]]


def write_file(
    path: Path, entries: Mapping[str, Value], tensors: Sequence[NewTensor], progress: Progress
) -> None:
    """Write a file; `progress` is told the bytes of tensors that are done, and those in all.

    Raises InvalidInput for a `general.alignment` that cannot be used and for a disk without the
    room, and OSError.
    """
    alignment = alignment_of(entries)
    if alignment is None:
        raise InvalidInput(f"{ALIGNMENT_KEY} has to be a power of two from 8 to 65536")
    done, total = 0, sum(tensor.nbytes for tensor in tensors)
    check_space(path.parent, total)
    with open(path, "wb") as file:
        file.write(_header(entries, tensors, alignment))
        file.write(bytes(-file.tell() % alignment))
        for tensor in tensors:
            before = done
            for chunk in tensor.chunks():
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
            assert done - before == tensor.nbytes, tensor.name
            file.write(bytes(-tensor.nbytes % alignment))


def _header(
    entries: Mapping[str, Value], tensors: Sequence[NewTensor], alignment: int
) -> bytearray:
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(entries)))
    for key, value in entries.items():
        header += packed_text(key) + value.encoded()
    offset = 0
    for tensor in tensors:
        dimensions = len(tensor.shape)
        header += packed_text(tensor.name) + struct.pack(
            f"<I{dimensions}QIQ", dimensions, *reversed(tensor.shape), tensor.block.code, offset
        )
        offset += -(-tensor.nbytes // alignment) * alignment
    return header
