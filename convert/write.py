"""A planned conversion becomes a GGUF, written beside the target and renamed at the end."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile, InvalidInput
from ..kernels.files import replacing
from ..kernels.formats.blocks import BlockFormat
from ..kernels.formats.gguf_writer import NewTensor, Progress, write_file
from ..kernels.formats.metadata import Value
from .encode import pieces, size_of, type_of
from .plan import Plan

#: `general.file_type` by the type of the matrices.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
QUANTIZATION_VERSION = 2


def write_gguf(
    target: Path, plan: Plan, metadata: dict[str, Any], outtype: BlockFormat, progress: Progress
) -> None:
    """Write a converted checkpoint; `progress` is told the bytes done and the bytes in all.

    Raises InvalidInput when the target cannot be written, InvalidFile for values that are not
    finite or too large for their type; a file that was there before then stays as it is.
    """
    pairs = {"general.architecture": plan.architecture, **metadata}
    entries = {key: _value(key, value) for key, value in pairs.items()}
    tensors = []
    for tensor in plan.tensors:
        block = type_of(tensor, outtype)
        source = partial(pieces, tensor, block)
        tensors.append(NewTensor(tensor.name, tensor.shape, block, size_of(tensor, block), source))
    with replacing(target) as path:
        write_file(path, entries, tensors, progress)


def _value(key: str, value: Any) -> Value:
    """A pair's value with the type GGUF readers expect: whole numbers u32, in arrays i32."""
    try:
        if isinstance(value, list | tuple):
            return Value.of(value, f"arr[{_kind(value[0], 'i32') if value else 'str'}]")
        return Value.of(value, _kind(value, "u32"))
    except InvalidInput as error:
        raise InvalidFile(f"{key} has a value that GGUF has no place for: {error}") from None


def _kind(value: Any, whole: str) -> str:
    for types, kind in ((bool, "bool"), (np.int32, "i32"), (int, whole), (float, "f32")):
        if isinstance(value, types):
            return kind
    return "str"
