"""One GGUF file, read through a memory map: nothing is copied, and nothing is trusted.

Source: the GGUF specification, versions 2 and 3, little endian.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..errors import InvalidFile
from .blocks import BY_CODE, BlockFormat
from .metadata import (
    ALIGNMENT_KEY,
    ARRAY,
    SCALARS,
    STRING,
    Metadata,
    Value,
    alignment_of,
    valid_key,
)

MAGIC = b"GGUF"
MAX_DIMENSIONS = 4
MAX_NAME = 63
#: What a file's pairs and descriptions of tensors may take, how many of each there may be, and how
#: many texts: more than models have, and little enough to be read in seconds.
MAX_HEADER = 128 << 20
MAX_ENTRIES = 1 << 16
MAX_TEXTS = 1 << 22

_LARGE_PAGE = 2 << 20
_U32, _U64 = struct.Struct("<I").unpack_from, struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` slowest dimension first, `offset` from its file's start.

    part  which of a model's files that is
    """

    name: str
    shape: tuple[int, ...]
    block: BlockFormat
    offset: int
    nbytes: int
    part: int = 0


class Part:
    """An open GGUF file: its `metadata`, its `tensors` in the order of their descriptions.

    Raises InvalidFile when the file cannot be opened, is no GGUF, is truncated, or describes
    tensors that do not lie inside it or that share bytes.
    """

    def __init__(self, path: str | Path, index: int = 0) -> None:
        self.path, self.index = Path(path), index
        if os.path.isdir(path):
            raise InvalidFile(f"{path} is a folder; name a .gguf file, or convert the checkpoint")
        if os.path.exists(path) and not os.path.isfile(path):
            raise InvalidFile(f"{path} is no ordinary file; name a .gguf file")
        try:
            with open(self.path, "rb") as file:
                self._identity = os.fstat(file.fileno())
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise InvalidFile(f"{self.path}: there is no such file") from None
        except ValueError:
            raise InvalidFile(f"{self.path} is empty; download or convert it again") from None
        except OSError as error:
            raise InvalidFile(f"{self.path} cannot be opened: {error.strerror}") from None
        try:
            self._read_header()
        except (struct.error, IndexError, OverflowError):
            if len(self.map) > MAX_HEADER:
                raise self.broken(f"has a header of more than {MAX_HEADER >> 20} MiB") from None
            raise self.broken("ends in the middle of its header") from None

    def _read_header(self) -> None:
        buffer = memoryview(self.map)[:MAX_HEADER]
        if buffer[:4] != MAGIC:
            raise InvalidFile(f"{self.path} is not a GGUF file (its first bytes are not 'GGUF')")
        (self.version,) = _U32(buffer, 4)
        if self.version not in (2, 3):
            if int.from_bytes(buffer[4:8], "big") in (2, 3):
                raise InvalidFile(
                    f"{self.path} is a big-endian GGUF; convert it on a little-endian machine"
                )
            raise InvalidFile(
                f"{self.path} is GGUF version {self.version}; versions 2 and 3 can be read"
            )
        tensor_count, pair_count = _U64(buffer, 8)[0], _U64(buffer, 16)[0]
        # A pair takes at least 13 bytes, a tensor's description 24: counts beyond that are a lie.
        if 24 + pair_count * 13 + tensor_count * 24 > len(self.map):
            raise self.broken("announces more entries than it can hold")
        if max(tensor_count, pair_count) > MAX_ENTRIES:
            raise self.broken(
                f"announces {tensor_count} tensors and {pair_count} keys, where {MAX_ENTRIES} of "
                "each can be read"
            )
        reader = _Reader(buffer, 24, self)
        self.metadata = Metadata(reader.pairs(pair_count))
        alignment = alignment_of(self.metadata.entries)
        if alignment is None:
            raise self.broken(f"has a {ALIGNMENT_KEY} that is no power of two from 8 to 65536")
        self.alignment = alignment
        infos = [reader.tensor() for _ in range(tensor_count)]
        self.data_start = -(-reader.at // alignment) * alignment
        self.tensors = self._place(infos)

    def _place(self, infos: list[TensorInfo]) -> dict[str, TensorInfo]:
        """Turn offsets relative to the data section into offsets of the file, checking extents."""
        tensors: dict[str, TensorInfo] = {}
        for info in infos:
            start = self.data_start + info.offset
            if info.name in tensors:
                raise self.broken(f"describes the tensor {info.name} twice")
            if info.offset % self.alignment:
                raise self.broken(
                    f"places the tensor {info.name} off its alignment of {self.alignment}"
                )
            if start + info.nbytes > len(self.map):
                raise self.broken(f"ends before its tensor {info.name} does")
            tensors[info.name] = TensorInfo(
                info.name, info.shape, info.block, start, info.nbytes, self.index
            )
        # Else a small file could describe any amount of work.
        ordered = sorted(tensors.values(), key=lambda info: info.offset)
        for first, second in pairwise(ordered):
            if first.offset + first.nbytes > second.offset:
                raise self.broken(f"places the tensors {first.name} and {second.name} on one spot")
        return tensors

    def chunks(self, start: int, nbytes: int, step: int) -> Iterator[memoryview]:
        """`nbytes` bytes of the file, up to `step` at a time, each valid until the next.

        They are read and not mapped: a disk that fails is then an error, and no signal. Raises
        InvalidFile for that, and for a file that is not what it was when it was opened.
        """
        buffer = memoryview(bytearray(min(step, nbytes)))
        try:
            with open(self.path, "rb") as file:
                now, then = os.fstat(file.fileno()), self._identity
                same = os.path.samestat(now, then) and now.st_size == then.st_size
                file.seek(start)
                for at in range(0, nbytes, step):
                    chunk = buffer[: min(step, nbytes - at)]
                    if not same or file.readinto(chunk) != len(chunk):
                        raise InvalidFile(f"{self.path} was changed while it was read; start again")
                    yield chunk
        except OSError as error:
            raise InvalidFile(f"{self.path} cannot be read: {error.strerror}") from None

    def release(self, start: int, end: int) -> None:
        """Give back the memory of mapped bytes; whoever reads them again, waits a little."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        # Reading a byte can bring in all of the large page that it lies in.
        start = start // _LARGE_PAGE * _LARGE_PAGE
        end = min(len(self.map), -(-end // _LARGE_PAGE) * _LARGE_PAGE)
        with contextlib.suppress(OSError):
            self.map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def broken(self, what: str) -> InvalidFile:
        """The error for a file that contradicts itself."""
        return InvalidFile(f"{self.path} {what}: it is damaged; download or convert it again")


class _Reader:
    """A cursor over the header. Reads past the end raise struct.error or IndexError."""

    def __init__(self, buffer: memoryview, at: int, part: Part) -> None:
        self.buffer, self.at, self.part, self.texts = buffer, at, part, 0

    def u32(self) -> int:
        self.at += 4
        return _U32(self.buffer, self.at - 4)[0]

    def u64(self) -> int:
        self.at += 8
        return _U64(self.buffer, self.at - 8)[0]

    def name(self) -> str:
        """A key or a tensor's name; what cannot be printed would spoil every message about it."""
        try:
            name = str(self.take(self.u64()), "utf-8")
        except UnicodeDecodeError:
            raise self.part.broken("holds a name that is not UTF-8") from None
        if not valid_key(name):
            raise self.part.broken(f"holds a name that can be none, {name[:40]!r}")
        return name

    def take(self, nbytes: int) -> memoryview:
        if nbytes > len(self.buffer) - self.at:
            raise IndexError
        self.at += nbytes
        return self.buffer[self.at - nbytes : self.at]

    def pairs(self, count: int) -> dict[str, Value]:
        entries: dict[str, Value] = {}
        for _ in range(count):
            key = self.name()
            if key in entries:
                raise self.part.broken(f"holds the key {key[:64]} twice")
            code, elements = self.u32(), None
            if code == ARRAY:
                code, elements = self.u32(), self.u64()
            entries[key] = self.value(key, code, elements)
        return entries

    def value(self, key: str, code: int, elements: int | None) -> Value:
        """Step over a value; texts have to be walked one by one, everything else is a jump."""
        start, count = self.at, 1 if elements is None else elements
        if code == STRING:
            if count * 8 > len(self.buffer) - start:
                raise IndexError
            self.texts += count
            if self.texts > MAX_TEXTS:
                raise self.part.broken(f"holds more than {MAX_TEXTS} texts")
            buffer, at, unpack = self.buffer, start, _U64
            for _ in range(count):
                at += 8 + unpack(buffer, at)[0]
            self.take(at - start)
        elif code in SCALARS:
            self.take(count * SCALARS[code].itemsize)
        else:
            raise self.part.broken(f"gives the key {key[:64]} a value of unknown type {code}")
        return Value(code, self.buffer[start : self.at], elements)

    def tensor(self) -> TensorInfo:
        name = self.name()
        dimensions = self.u32()
        if len(name.encode()) > MAX_NAME or not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.part.broken(f"describes a tensor {name[:64]!r} of {dimensions} dimensions")
        ne = [self.u64() for _ in range(dimensions)]
        code, offset = self.u32(), self.u64()
        block = BY_CODE.get(code)
        if block is None:
            raise InvalidFile(
                f"{self.part.path}: tensor {name} has type {code}, which is unknown or withdrawn; "
                "quantize the model again with a current tool"
            )
        if 0 in ne or ne[0] % block.elements:
            raise self.part.broken(
                f"describes {name} with {ne[0]} columns, no multiple of {block.elements}"
            )
        nbytes = math.prod(ne) // block.elements * block.nbytes
        return TensorInfo(name, tuple(reversed(ne)), block, offset, nbytes)
