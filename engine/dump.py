"""Everything a GGUF file says about itself, with types and places, for people and for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.formats.gguf import GGUF
from ..kernels.formats.metadata import Value
from .info import open_file
from .wording import shown

#: Elements of an array, and characters of a text, that are shown of a long one.
SHOWN_ELEMENTS, SHOWN_CHARACTERS = 6, 60


def dump(path: str | Path, full: bool, tensors: bool) -> dict[str, Any]:
    """Facts about a file, ready for JSON; arrays are cut off unless they are wanted in `full`.

    Numbers that are not finite come as texts, for JSON has none.
    """
    file = open_file(path)
    facts: dict[str, Any] = {
        "parts": [
            {
                "file": str(part.path),
                "version": part.version,
                "alignment": part.alignment,
                "data_offset": part.data_start,
                "bytes": len(part.map),
            }
            for part in file.parts
        ],
        "metadata": {key: _described(value, full) for key, value in file.metadata.entries.items()},
    }
    if tensors:
        facts["tensors"] = _tensors(file)
    return facts


def dump_lines(path: str | Path, full: bool, tensors: bool) -> Iterator[str]:
    """The same for people, line by line; nothing of a file reaches the terminal unescaped."""
    facts = dump(path, full, tensors)
    for part in facts["parts"]:
        yield (
            f"{shown(part['file'])}: GGUF version {part['version']}, "
            f"alignment {part['alignment']}, "
            f"data from byte {part['data_offset']}, {part['bytes']} bytes"
        )
    yield f"{len(facts['metadata'])} keys"
    for key, value in facts["metadata"].items():
        yield f"  {key:40} {value['type']:10} {_line(value, full)}"
    if tensors:
        yield f"{len(facts['tensors'])} tensors"
        for t in facts["tensors"]:
            place = f"{t['part']}:{t['offset']}" if len(facts["parts"]) > 1 else t["offset"]
            yield f"  {t['name']:40} {t['type']:10} {t['shape']!s:24} {place:>14} {t['bytes']:>12}"


def _tensors(file: GGUF) -> list[dict[str, Any]]:
    return [
        {
            "name": info.name,
            "type": info.block.name,
            "shape": list(info.shape),
            "part": info.part,
            "offset": info.offset,
            "bytes": info.nbytes,
        }
        for info in file.tensors.values()
    ]


def _described(value: Value, full: bool) -> dict[str, Any]:
    if value.count is None:
        return {"type": value.kind, "value": _plain(value, value.decode())}
    items = value.decode(None if full else SHOWN_ELEMENTS)
    return {
        "type": value.kind,
        "count": value.count,
        "value": [_plain(value, item) for item in items],
    }


def _plain(value: Value, item: Any) -> Any:
    """An element as JSON has it; float32 with no more digits than tell it from its neighbours."""
    if not isinstance(item, float | np.floating):
        return item.item() if isinstance(item, np.generic) else item
    if not math.isfinite(item):
        return str(float(item))
    return float(str(np.float32(item))) if "f32" in value.kind else float(item)


def _line(value: dict[str, Any], full: bool) -> str:
    text = shown(json.dumps(value["value"], ensure_ascii=False))
    if "count" in value:
        rest = "" if len(value["value"]) == value["count"] else f" and so on: {value['count']}"
        return text + rest
    if full or len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]}... {len(value['value'])} characters"
