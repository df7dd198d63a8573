"""Writing GGUF: one tensor at a time, into a file beside the target, renamed at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile, InvalidInput
from ..kernels.formats import blocks
from ..kernels.formats.blocks import F16, F32, BlockFormat
from .plan import Plan, Tensor

#: Bytes of float32 that are encoded at once.
CHUNK_BYTES = 8 << 20

#: `general.file_type` by the type of the matrices.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
QUANTIZATION_VERSION = 2

Progress = Callable[[int, int], None]


def write_gguf(
    target: Path, plan: Plan, metadata: dict[str, Any], outtype: BlockFormat, progress: Progress
) -> None:
    """Write a converted checkpoint; `progress` is told the bytes done and the bytes in all.

    Raises InvalidInput when the target cannot be written; nothing is left of it then, and a file
    that was there before stays as it is.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        _write(partial, plan, metadata, outtype, progress)
        os.replace(partial, target)
    except OSError as error:
        raise InvalidInput(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _write(
    path: Path, plan: Plan, metadata: dict[str, Any], outtype: BlockFormat, progress: Progress
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, plan.architecture)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        kinds = [_type_of(tensor, outtype) for tensor in plan.tensors]
        sizes = [int(np.prod(tensor.shape[:-1])) * kind.row_bytes(tensor.shape[-1])
                 for tensor, kind in zip(plan.tensors, kinds, strict=True)]  # fmt: skip
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


def _encoded(tensor: Tensor, kind: BlockFormat):
    """A tensor's bytes, a few megabytes at a time."""
    rows, width = int(np.prod(tensor.shape[:-1])), tensor.shape[-1]
    step = max(1, CHUNK_BYTES // (4 * width))
    if tensor.transform is not None:
        values = tensor.transform(*(source.read() for source in tensor.sources))
        if values.size != rows * width:
            raise _misshapen(tensor, values.shape)
        values = values.reshape(rows, width)
        for first in range(0, rows, step):
            yield blocks.quantize(values[first : first + step], kind).tobytes()
        return
    (source,) = tensor.sources
    if int(np.prod(source.shape)) != rows * width:
        raise _misshapen(tensor, source.shape)
    if rows == 1 or source.shape[0] != rows:
        yield blocks.quantize(source.read().reshape(rows, width), kind).tobytes()
        return
    for first in range(0, rows, step):
        yield blocks.quantize(source.read(first, step).reshape(-1, width), kind).tobytes()


def _misshapen(tensor: Tensor, shape: tuple[int, ...]) -> InvalidFile:
    return InvalidFile(
        f"the checkpoint's tensor for {tensor.name} has the shape {list(shape)} where config.json "
        f"asks for {list(tensor.shape)}; the two do not belong together"
    )


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a pair with the type GGUF readers expect: whole numbers u32, others f32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
