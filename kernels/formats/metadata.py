"""Key-value pairs of a GGUF: each value keeps the type and the bytes that its file gives it.

Source: the GGUF specification; types are named as llama.cpp prints them. Values are decoded when
they are asked for: opening a file takes little time whatever its vocabulary's size, and what is
copied from file to file stays the same to the last bit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from ..errors import InvalidInput

STRING, ARRAY = 8, 9
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_KEY = 65535

#: The types of single values: name and code, then NumPy's and struct's name for their bytes.
_TABLE = [
    ("u8", 0, "<u1", "B"), ("i8", 1, "<i1", "b"), ("u16", 2, "<u2", "H"), ("i16", 3, "<i2", "h"),
    ("u32", 4, "<u4", "I"), ("i32", 5, "<i4", "i"), ("f32", 6, "<f4", "f"), ("bool", 7, "?", "?"),
    ("u64", 10, "<u8", "Q"), ("i64", 11, "<i8", "q"), ("f64", 12, "<f8", "d"),
]  # fmt: skip
SCALARS: dict[int, np.dtype[Any]] = {code: np.dtype(numpy) for _, code, numpy, _ in _TABLE}
_FORMATS = {code: form for _, code, _, form in _TABLE}
_CODES = {name: code for name, code, _, _ in _TABLE} | {"str": STRING}
_NAMES = {code: name for name, code in _CODES.items()}

#: All types: `str`, `u8`, ... and arrays of them.
KINDS = (*_CODES, *(f"arr[{name}]" for name in _CODES))

_U64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class Value:
    """A value as a file holds it.

    code   its type's number, or that of an array's elements
    raw    its bytes; those of an array's elements one after another
    count  elements of an array; None for a single value
    """

    code: int
    raw: memoryview | bytes
    count: int | None = None

    @classmethod
    def of(cls, value: Any, kind: str) -> Value:
        """Encode a value as one of KINDS; texts may be str or bytes, arrays any sequence.

        Raises InvalidInput for a value that the type cannot hold.
        """
        array = kind.startswith("arr[")
        code = _CODES[kind[4:-1] if array else kind]
        try:
            if array and isinstance(value, str | bytes):
                raise TypeError
            items = list(value) if array else [value]
            if code == STRING:
                raw = b"".join(map(_text, items))
            else:
                raw = struct.pack(f"<{len(items)}{_FORMATS[code]}", *items)
        except (struct.error, TypeError, OverflowError, UnicodeError):
            raise InvalidInput(f"{str(value)[:60]!r} cannot be stored as {kind}") from None
        return cls(code, raw, len(items) if array else None)

    @property
    def kind(self) -> str:
        """The name of its type."""
        name = _NAMES[self.code]
        return name if self.count is None else f"arr[{name}]"

    def decode(self, limit: int | None = None) -> Any:
        """A number, truth value or text; of an array a list of texts, or an ndarray.

        limit: how many elements of an array are wanted. Bytes that are no UTF-8 become U+FFFD.
        """
        count = 1 if self.count is None else self.count
        count = count if limit is None else min(count, limit)
        if self.code == STRING:
            texts = _texts(memoryview(self.raw), count)
            return texts[0] if self.count is None else texts
        values = np.frombuffer(self.raw, SCALARS[self.code], count)
        return values[0].item() if self.count is None else values.copy()

    def encoded(self) -> bytes:
        """As it stands in a file, behind its key."""
        if self.count is None:
            return struct.pack("<I", self.code) + self.raw
        return struct.pack("<IIQ", ARRAY, self.code, self.count) + self.raw


class Metadata(Mapping[str, Any]):
    """Key-value pairs of a file, decoded; `entries` has them as they are stored."""

    def __init__(self, entries: dict[str, Value]) -> None:
        self.entries = entries
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            self._decoded[key] = self.entries[key].decode()
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def length(self, key: str) -> int:
        """Number of elements of an array, without decoding it; 0 for anything else."""
        value = self.entries.get(key)
        return value.count or 0 if value is not None else 0


def alignment_of(entries: Mapping[str, Value]) -> int | None:
    """What tensors are aligned to; None where the pair's value cannot be meant."""
    value = entries.get(ALIGNMENT_KEY)
    alignment = DEFAULT_ALIGNMENT if value is None else value.decode()
    if type(alignment) is not int or not 8 <= alignment <= 1 << 16:
        return None
    return None if alignment & (alignment - 1) else alignment


def valid_key(key: str) -> bool:
    """Whether a file may have a key: some text that can be printed, not longer than MAX_KEY."""
    return key.isprintable() and 0 < len(key.encode()) <= MAX_KEY


def packed_text(text: str | bytes) -> bytes:
    """A text as a file holds it: its length in front."""
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
    return struct.pack("<Q", len(raw)) + raw


def _text(item: Any) -> bytes:
    if not isinstance(item, str | bytes):
        raise TypeError
    return packed_text(item)


def _texts(raw: memoryview, count: int) -> list[str]:
    """The texts of an array, of which `count` are wanted."""
    texts = _texts_at_once(raw, count) if count > 1 else None
    return list(_texts_in_turn(raw, count)) if texts is None else texts


def _texts_in_turn(raw: memoryview, count: int) -> Iterator[str]:
    at = 0
    for _ in range(count):
        end = at + 8 + _U64(raw, at)[0]
        yield str(raw[at + 8 : end], "utf-8", "replace")
        at = end


def _texts_at_once(raw: memoryview, count: int) -> list[str] | None:
    """The same for a whole vocabulary, in a third of the time; None where that cannot be done.

    Lengths below 65536 end in six zero bytes, which texts do not hold: so they are found all at
    once. Each becomes one zero byte, at which what lies between them is cut.
    """
    data = np.frombuffer(raw, np.uint8)
    zero = data == 0
    ends = reduce(np.logical_and, (zero[i : len(zero) - 7 + i] for i in range(2, 8)))
    starts = np.flatnonzero(ends[:-1] & ~ends[1:])
    lengths = data[starts] + (data[starts + 1].astype(np.int64) << 8)
    follow = starts + 8 + lengths
    if len(starts) != count or starts[0] or follow[-1] != len(data):
        return None
    if not np.array_equal(follow[:-1], starts[1:]):
        return None
    kept = np.ones(len(data), bool)
    kept[starts[:, None] + np.arange(1, 8)] = False
    joined = data[kept]
    joined[starts - 7 * np.arange(count)] = 0
    _, *texts = joined.tobytes().decode("utf-8", "replace").split("\0")
    return texts if len(texts) == count else None
