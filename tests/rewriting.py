"""Model files read, and written anew with other keys or tensors, by the package of llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

import keelback
from keelback.kernels.formats.gguf import GGUF


def tensor(path: Path, name: str) -> np.ndarray:
    file = GGUF(path)
    return file.data(file.tensors[name]).view(np.float32).reshape(file.tensors[name].shape)


def rewritten(path: Path, target: Path, changes: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """A file with other keys or tensors; None takes one away."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture")) or key in changes:
            continue
        writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for key, value in changes.items():
        if value is not None:
            kinds = {bool: "BOOL", int: "UINT32", str: "STRING", list: "ARRAY"}
            kind, inner = gguf.GGUFValueType[kinds[type(value)]], gguf.GGUFValueType.INT32
            writer.add_key_value(key, value, kind, inner if isinstance(value, list) else None)
    kept = {item.name: item.data for item in reader.tensors}
    for name, values in {**kept, **tensors}.items():
        if values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def logits(path: Path, ids: np.ndarray) -> np.ndarray:
    return keelback.Model(path, threads=1, notice=lambda text: None).forward(ids, logits="all")[0]
