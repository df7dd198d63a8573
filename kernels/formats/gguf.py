"""GGUF, read through a memory map: nothing is copied, and nothing is trusted.

Source: the GGUF specification, versions 2 and 3, little endian. Arrays of the metadata are decoded
when they are asked for, so that opening a file takes milliseconds whatever its vocabulary's size.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidFile
from .blocks import BY_CODE, BlockFormat

MAGIC = b"GGUF"
MAX_DIMENSIONS = 4
MAX_NAME = 63
DEFAULT_ALIGNMENT = 32

_LARGE_PAGE = 2 << 20

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"),
    4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), _BOOL: np.dtype("?"),
    10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
_U32, _U64 = struct.Struct("<I").unpack_from, struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` slowest dimension first, `offset` from the file's start."""

    name: str
    shape: tuple[int, ...]
    block: BlockFormat
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Array:
    """An array of the metadata that has been stepped over and not decoded."""

    kind: int
    count: int
    offset: int


class Metadata(Mapping[str, Any]):
    """Key-value pairs of a file; arrays of strings come as lists, others as ndarrays."""

    def __init__(self, buffer: memoryview, entries: dict[str, Any]) -> None:
        self._buffer, self._entries = buffer, entries

    def __getitem__(self, key: str) -> Any:
        value = self._entries[key]
        if isinstance(value, _Array):
            value = self._entries[key] = self._decode(value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def length(self, key: str) -> int:
        """Number of elements of an array, without decoding it; 0 for anything else."""
        value = self._entries.get(key)
        if isinstance(value, _Array):
            return value.count
        return len(value) if isinstance(value, list | np.ndarray) else 0

    def _decode(self, array: _Array) -> Any:
        if array.kind != _STRING:
            return np.frombuffer(
                self._buffer, _SCALARS[array.kind], array.count, array.offset
            ).copy()
        buffer, at, strings = self._buffer, array.offset, []
        for _ in range(array.count):
            end = at + 8 + _U64(buffer, at)[0]
            strings.append(str(buffer[at + 8 : end], "utf-8", "replace"))
            at = end
        return strings


class GGUF:
    """An open GGUF file: `metadata`, `tensors` by name, and `data(info)` for their bytes.

    Raises InvalidFile when the file cannot be opened, is no GGUF, is truncated, or describes
    tensors that do not lie inside it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise InvalidFile(f"{path} is a folder; name a .gguf file, or convert the checkpoint")
        if self.path.exists() and not self.path.is_file():
            raise InvalidFile(f"{path} is no ordinary file; name a .gguf file")
        try:
            with open(self.path, "rb") as file:
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
            raise self._broken("ends in the middle of its header") from None

    def _read_header(self) -> None:
        buffer = memoryview(self.map)
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
        if 24 + pair_count * 13 + tensor_count * 24 > len(buffer):
            raise self._broken("announces more entries than it can hold")
        reader = _Reader(buffer, 24, self)
        self.metadata = Metadata(buffer, reader.pairs(pair_count))
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self._broken(
                f"has general.alignment = {alignment!r}, which is not a power of two from 8 up"
            )
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
                raise self._broken(f"describes the tensor {info.name} twice")
            if info.offset % self.alignment:
                raise self._broken(
                    f"places the tensor {info.name} off its alignment of {self.alignment}"
                )
            if start + info.nbytes > len(self.map):
                raise self._broken(f"ends before its tensor {info.name} does")
            tensors[info.name] = TensorInfo(info.name, info.shape, info.block, start, info.nbytes)
        return tensors

    def data(self, info: TensorInfo) -> np.ndarray:
        """The bytes of a tensor: uint8, read-only, a view of the map."""
        return np.frombuffer(self.map, np.uint8, info.nbytes, info.offset)

    def release(self, info: TensorInfo, start: int = 0, end: int | None = None) -> None:
        """Give back the memory of bytes `start` to `end` of a tensor, and of their neighbours.

        Whoever reads them again, waits a little.
        """
        last = info.nbytes if end is None else end
        self._release(info.offset + start, info.offset + last)

    def release_all(self) -> None:
        """Give back the memory of all that has been read."""
        self._release(0, len(self.map))

    def _release(self, start: int, end: int) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        # Reading a byte can bring in all of the large page that it lies in.
        start = start // _LARGE_PAGE * _LARGE_PAGE
        end = min(len(self.map), -(-end // _LARGE_PAGE) * _LARGE_PAGE)
        with contextlib.suppress(OSError):
            self.map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _broken(self, what: str) -> InvalidFile:
        return InvalidFile(f"{self.path} {what}: it is damaged; download or convert it again")


class _Reader:
    """A cursor over the header. Reads past the end raise struct.error or IndexError."""

    def __init__(self, buffer: memoryview, at: int, file: GGUF) -> None:
        self.buffer, self.at, self.file = buffer, at, file

    def u32(self) -> int:
        self.at += 4
        return _U32(self.buffer, self.at - 4)[0]

    def u64(self) -> int:
        self.at += 8
        return _U64(self.buffer, self.at - 8)[0]

    def string(self) -> str:
        raw = self.take(self.u64())
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self.file._broken("holds a key or text that is not UTF-8") from None

    def take(self, nbytes: int) -> memoryview:
        if nbytes > len(self.buffer) - self.at:
            raise IndexError
        self.at += nbytes
        return self.buffer[self.at - nbytes : self.at]

    def pairs(self, count: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for _ in range(count):
            key = self.string()
            if key in entries:
                raise self.file._broken(f"holds the key {key} twice")
            entries[key] = self.value(key, self.u32())
        return entries

    def value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(key, self.u32(), self.u64())
        return np.frombuffer(self.take(self.scalar(key, kind).itemsize), _SCALARS[kind])[0].item()

    def array(self, key: str, kind: int, count: int) -> _Array:
        """Step over an array; strings have to be walked one by one, everything else is a jump."""
        start = self.at
        if kind == _STRING:
            if count * 8 > len(self.buffer) - start:
                raise IndexError
            buffer, at, unpack = self.buffer, start, _U64
            for _ in range(count):
                at += 8 + unpack(buffer, at)[0]
            if at > len(buffer):
                raise IndexError
            self.at = at
        else:
            self.take(count * self.scalar(key, kind).itemsize)
        return _Array(kind, count, start)

    def scalar(self, key: str, kind: int) -> np.dtype:
        if kind not in _SCALARS:
            raise self.file._broken(f"gives the key {key} a value of unknown type {kind}")
        return _SCALARS[kind]

    def tensor(self) -> TensorInfo:
        name = self.string()
        dimensions = self.u32()
        if not 0 < len(name.encode()) <= MAX_NAME or not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.file._broken(f"describes a tensor {name[:64]!r} of {dimensions} dimensions")
        ne = [self.u64() for _ in range(dimensions)]
        code, offset = self.u32(), self.u64()
        block = BY_CODE.get(code)
        if block is None:
            raise InvalidFile(
                f"{self.file.path}: tensor {name} has type {code}, which is unknown or withdrawn; "
                "quantize the model again with a current tool"
            )
        if 0 in ne or ne[0] % block.elements:
            raise self.file._broken(
                f"describes {name} with {ne[0]} columns, no multiple of {block.elements}"
            )
        nbytes = math.prod(ne) // block.elements * block.nbytes
        return TensorInfo(name, tuple(reversed(ne)), block, offset, nbytes)
