"""A planned conversion becomes a GGUF: tensor by tensor, encoded a few megabytes at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile, InvalidInput
from ..kernels.files import replacing
from ..kernels.formats import blocks
from ..kernels.formats.blocks import F16, F32, BlockFormat
from ..kernels.formats.gguf_writer import NewTensor, Progress, write_file
from ..kernels.formats.metadata import Value
from .plan import Plan, Tensor

#: Bytes of float32 that are encoded at once.
CHUNK_BYTES = 8 << 20

#: `general.file_type` by the type of the matrices.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
QUANTIZATION_VERSION = 2

#: The largest value a type can hold, where that is less than float32's.
_LIMITS = {"F16": 65504.0, "BF16": 3.38e38, "Q8_0": 65504.0 * 127}


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
        block = _type_of(tensor, outtype)
        chunks = partial(_encoded, tensor, block)
        size = _size_of(tensor, block)
        tensors.append(NewTensor(tensor.name, tensor.shape, block, size, chunks))
    with replacing(target) as path:
        write_file(path, entries, tensors, progress)


def _type_of(tensor: Tensor, outtype: BlockFormat) -> BlockFormat:
    """The type a tensor gets: F32 where it has to be, F16 where rows do not divide into blocks."""
    if tensor.always_f32:
        return F32
    return F16 if tensor.shape[-1] % outtype.elements else outtype


def _size_of(tensor: Tensor, kind: BlockFormat) -> int:
    return math.prod(tensor.shape[:-1]) * kind.row_bytes(tensor.shape[-1])


def _encoded(tensor: Tensor, kind: BlockFormat) -> Iterator[bytes]:
    """A tensor's bytes, a few megabytes at a time."""
    if not tensor.parts:
        yield bytes(_size_of(tensor, kind))
    for part in tensor.parts:
        rows = part.source.rows
        step = max(1, CHUNK_BYTES * rows // (4 * math.prod(part.source.shape)))
        for first in range(0, part.count, step):
            values = part.read(first, step)
            _check(tensor, kind, values)
            yield blocks.quantize(values, kind).tobytes()


def _check(tensor: Tensor, kind: BlockFormat, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise InvalidFile(
            f"the values of {tensor.name} are not finite; the checkpoint is damaged, or its "
            "training failed"
        )
    if kind.name in _LIMITS and np.abs(values).max() > _LIMITS[kind.name]:
        raise InvalidFile(
            f"a value of {tensor.name} is too large for {kind.name}; convert with --outtype f32"
        )


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
