"""Headers of safetensors files, read here because bfloat16 and float8 are unknown to NumPy.

Source: the safetensors format (an 8-byte length, a JSON header, then the data).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidFile
from .source import BYTES, InputFile, Stored

_LARGEST_HEADER = 100 << 20


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name; raises InvalidFile for one that is damaged."""
    file = InputFile(path)
    damaged = InvalidFile(f"{path} is damaged or incomplete; download it again")
    if file.size < 8:
        raise damaged
    length = int.from_bytes(file.read(0, 8), "little")
    if not 2 <= length <= min(_LARGEST_HEADER, file.size - 8):
        raise damaged
    try:
        header = json.loads(file.read(8, length))
        return {
            name: _stored(file, 8 + length, name, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged from None


def _stored(file: InputFile, start: int, name: str, entry: dict[str, Any]) -> Stored:
    kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(kind, str):
        raise TypeError
    numbers_fit = all(type(n) is int and 0 <= n <= file.size for n in (*shape, first, last))
    if not numbers_fit or first > last or start + last > file.size:
        raise InvalidFile(
            f"{file.path}: tensor {name} does not lie inside the file; download it again"
        )
    if kind in BYTES and math.prod(shape) * BYTES[kind] != last - first:
        raise InvalidFile(
            f"{file.path}: tensor {name} has not as many bytes as its shape says; download it again"
        )
    return Stored(file, kind, shape, start + first)
