"""Writing GGUF: one tensor at a time, into a file beside the target, renamed at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile
from ..kernels.files import replacing
from ..kernels.formats import blocks
from ..kernels.formats.blocks import F16, F32, BlockFormat
from .plan import Plan, Tensor

#: Bytes of float32 that are encoded at once.
CHUNK_BYTES = 8 << 20

#: `general.file_type` by the type of the matrices.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
QUANTIZATION_VERSION = 2

#: The largest value a type can hold, where that is less than float32's.
_LIMITS = {"F16": 65504.0, "BF16": 3.38e38, "Q8_0": 65504.0 * 127}

Progress = Callable[[int, int], None]


def write_gguf(
    target: Path, plan: Plan, metadata: dict[str, Any], outtype: BlockFormat, progress: Progress
) -> None:
    """Write a converted checkpoint; `progress` is told the bytes done and the bytes in all.

    Raises InvalidInput when the target cannot be written, InvalidFile for values that are not
    finite or too large for their type; a file that was there before then stays as it is.
    """
    with replacing(target) as partial:
        _write(partial, plan, metadata, outtype, progress)


def _write(
    path: Path, plan: Plan, metadata: dict[str, Any], outtype: BlockFormat, progress: Progress
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, plan.architecture)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        kinds = [_type_of(tensor, outtype) for tensor in plan.tensors]
        sizes = [_size_of(tensor, kind) for tensor, kind in zip(plan.tensors, kinds, strict=True)]
        for tensor, kind, size in zip(plan.tensors, kinds, sizes, strict=True):
            raw = gguf.GGMLQuantizationType(kind.code)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file, done, total = writer.fout[0], 0, sum(sizes)
        file.write(bytes(-file.tell() % writer.data_alignment))
        for tensor, kind, size in zip(plan.tensors, kinds, sizes, strict=True):
            for encoded in _encoded(tensor, kind):
                file.write(encoded)
                done += len(encoded)
                progress(done, total)
            file.write(bytes(-size % writer.data_alignment))
    finally:
        writer.close()


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


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a pair with the type GGUF readers expect: whole numbers u32, others f32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, np.int32):
        writer.add_int32(key, int(value))
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
