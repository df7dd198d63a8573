"""Hugging Face checkpoints to GGUF, one file an architecture, found by the config's model_type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidInput, UnsupportedModel
from ..kernels.files import check_target
from .architectures import module_of, modules
from .checkpoint import Checkpoint
from .config import Config, read_json_if_there
from .importance import Weighing
from .mixture import FILE_TYPES, FileType, file_type
from .plan import Plan
from .refusals import unknown_family
from .tokenizer import read_tokenizer
from .write import QUANTIZATION_VERSION, write_gguf

OUTTYPES = ("auto", *(name.lower() for name in FILE_TYPES))

#: Sampling defaults: generation_config.json's name, GGUF's, the type, and what makes sense.
_SAMPLING: list[tuple[str, str, Callable[[float], Any], float, float]] = [
    ("temperature", "temp", float, 0, 100),
    ("top_k", "top_k", np.int32, 0, 1 << 24),
    ("top_p", "top_p", float, 0, 1),
    ("min_p", "min_p", float, 0, 1),
    ("repetition_penalty", "penalty_repeat", float, 1e-3, 100),
]


def convert(
    checkpoint: str | Path,
    target: str | Path | None = None,
    outtype: str = "auto",
    notice: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    tokenizer: str | Path | None = None,
    imatrix: str | Path | None = None,
) -> Path:
    """Convert a checkpoint, a folder or one file in it, to a GGUF file and return the file's path.

    target: default `<the checkpoint's name>-<TYPE>.gguf` here. outtype: one of OUTTYPES; "auto"
    keeps the checkpoint's own precision. tokenizer: a folder or file to take the vocabulary from,
    where it is not in the checkpoint. imatrix: an importance matrix, which quantized types use.
    `notice` is told what the file cannot say to llama.cpp,
    and what is left out; `progress` the bytes done and in all. Raises UnsupportedModel, InvalidFile
    or InvalidInput; nothing is half-written then.
    """
    source = Checkpoint(checkpoint)
    plan = plan_for(source)
    source.check_all_used()
    kind = output_type(plan, outtype)
    weighing = None if imatrix is None else Weighing(imatrix)
    path = Path(target) if target is not None else Path(f"{source.name}-{kind.name}.gguf")
    written = check_target(path, [imatrix])
    # Beside a checkpoint's files its GGUF may lie, and be written anew.
    beside = written.parent == source.folder.resolve() and written.suffix != ".gguf"
    if written in {file.resolve() for file in source.files} or (beside and written.exists()):
        raise InvalidInput(f"{path} is part of the checkpoint; name another file to write")
    if source.left_aside:
        notice(
            f"{len(source.left_aside)} tensors that are no part of the language model are left "
            f"out, {min(source.left_aside)[:80]} among them"
        )
    for remark in plan.remarks:
        notice(remark)
    vocabulary = None if tokenizer is None else Path(tokenizer)
    metadata = metadata_for(source, plan, kind, notice, vocabulary)
    write_gguf(path, plan, metadata, kind, progress, weighing, notice)
    return path


def plan_for(checkpoint: Checkpoint) -> Plan:
    """Ask the architecture of the checkpoint's model_type how to convert it.

    Raises InvalidFile where config and tensors do not go together or lack something,
    UnsupportedModel for options that keelback does not run.
    """
    return architecture_of(checkpoint.config).plan(checkpoint)


def architecture_of(config: Config) -> Any:
    """The module that converts a config's model_type; UnsupportedModel where there is none."""
    kind = config.get("model_type")
    if (module := module_of(kind)) is not None:
        return module
    known = ", ".join(sorted(name for module in modules() for name in module.MODEL_TYPES))
    raise unknown_family(config) or UnsupportedModel(
        f"{config.path}: the model_type {repr(kind)[:40]} is not known; keelback converts {known}"
    )


def output_type(plan: Plan, outtype: str) -> FileType:
    """The file type of a name; "auto" takes the type of the checkpoint's embedding."""
    if outtype.lower() != "auto":
        return file_type(outtype)
    kind = plan.tensors[0].parts[0].source.kind
    return FILE_TYPES.get(kind) or FILE_TYPES["F32" if kind == "F64" else "BF16"]


def metadata_for(
    checkpoint: Checkpoint,
    plan: Plan,
    kind: FileType,
    notice: Callable[[str], None],
    vocabulary: Path | None,
) -> dict[str, Any]:
    """All pairs of the file but the architecture, which the writer adds."""
    tokenizer = read_tokenizer(checkpoint.folder, plan.keys["vocab_size"], notice, vocabulary)
    if tokenizer["tokenizer.ggml.model"] == "none":
        notice(
            "the checkpoint has no tokenizer; prompts and answers will be token ids (--tokenizer "
            "takes one from elsewhere)"
        )
    return {
        "general.type": "model",
        "general.name": checkpoint.name,
        "general.file_type": kind.code,
        "general.quantization_version": QUANTIZATION_VERSION,
        **_sampling_defaults(checkpoint.folder / "generation_config.json", notice),
        **{f"{plan.architecture}.{key}": value for key, value in plan.keys.items()},
        **tokenizer,
    }


def _sampling_defaults(path: Path, notice: Callable[[str], None]) -> dict[str, Any]:
    """`general.sampling.*` from generation_config.json, where it says something sensible."""
    values = read_json_if_there(path)
    pairs: dict[str, Any] = {}
    for theirs, ours, kind, low, high in _SAMPLING:
        value = values.get(theirs)
        if value is None:
            continue
        if type(value) in (int, float) and low <= value <= high:
            pairs[f"general.sampling.{ours}"] = kind(value)
        else:
            notice(f"{path.name} says {theirs} = {repr(value)[:80]}, which is left out")
    return pairs
