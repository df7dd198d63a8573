"""A planned conversion becomes a GGUF, written beside the target and renamed at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile, InvalidInput
from ..kernels.files import replacing
from ..kernels.formats.blocks import BF16, F16, F32, Q8_0, BlockFormat
from ..kernels.formats.gguf_writer import NewTensor, Progress, write_file
from ..kernels.formats.metadata import Value
from .ahead import Ahead
from .encode import size_of, tasks
from .encoders import prepare
from .importance import Weighing
from .mixture import FileType, Traits, Weight, Wishes, fitting, is_quantizable, is_rounded, types_of
from .plan import Plan

QUANTIZATION_VERSION = 2


def write_gguf(
    target: Path,
    plan: Plan,
    metadata: dict[str, Any],
    kind: FileType,
    progress: Progress,
    weighing: Weighing | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> None:
    """Write a converted checkpoint; `progress` is told the bytes done and the bytes in all.

    weighing: the importance matrix that quantized types are chosen by; `notice` is told what it
    lacks. Raises InvalidInput when the target cannot be written, InvalidFile for values that are
    not finite or too large for their type; a file that was there before then stays as it is.
    """
    pairs = {"general.architecture": plan.architecture, **metadata}
    entries = {key: _value(key, value) for key, value in pairs.items()}
    types = _types(plan, kind, Traits.of(pairs), Wishes(importance=weighing is not None))
    importance: dict[str, np.ndarray] = {}
    if weighing is not None:
        rounded = ((t.name, t.shape) for t in plan.tensors if is_rounded(types[t.name]))
        importance, entries = weighing.of(rounded, notice), entries | weighing.pairs()
    prepare(types.values(), notice)
    work = [partial(tasks, t, types[t.name], importance.get(t.name)) for t in plan.tensors]
    with replacing(target) as path, Ahead(work) as made:
        tensors = [
            NewTensor(t.name, t.shape, types[t.name], size_of(t.shape, types[t.name]), pieces)
            for t, pieces in zip(plan.tensors, made, strict=True)
        ]
        write_file(path, entries, tensors, progress)


def _types(plan: Plan, kind: FileType, traits: Traits, wishes: Wishes) -> dict[str, BlockFormat]:
    """The type of each tensor; a matrix that no mixture touches gets what converters write."""
    plain = kind.block if kind.block in (F16, BF16, Q8_0) else F32
    weights = []
    for tensor in plan.tensors:
        weight = Weight(tensor.name, tensor.shape, F32)
        if is_quantizable(weight):
            weight = replace(weight, block=fitting(plain, weight.shape[-1]))
        weights.append(weight)
    return types_of(weights, kind, traits, wishes)


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
