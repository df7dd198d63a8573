"""Writing GGUF: one tensor at a time, into a file beside the target, renamed at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.files import check_space, replacing
from ..kernels.formats.blocks import BlockFormat
from .encode import pieces, size_of, type_of
from .plan import Plan

#: `general.file_type` by the type of the matrices.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
QUANTIZATION_VERSION = 2

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
        kinds = [type_of(tensor, outtype) for tensor in plan.tensors]
        sizes = [size_of(tensor, kind) for tensor, kind in zip(plan.tensors, kinds, strict=True)]
        check_space(path, sum(sizes))
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
            for piece in pieces(tensor, kind):
                file.write(piece.data)
                done += piece.size
                progress(done, total)
            file.write(bytes(-size % writer.data_alignment))
    finally:
        writer.close()


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
