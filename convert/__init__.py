"""Hugging Face checkpoints to GGUF, one file an architecture, found by the config's model_type."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidInput, UnsupportedModel
from ..kernels.formats.blocks import BY_NAME, BlockFormat
from .checkpoint import Checkpoint, read_json
from .plan import Plan
from .tokenizer import read_tokenizer
from .write import FILE_TYPES, QUANTIZATION_VERSION, write_gguf

OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")

_ARCHITECTURES = ("gated_deltanet", "mamba", "mamba2")

#: generation_config.json's names for the sampling defaults that GGUF has keys for.
_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def convert(
    checkpoint: str | Path,
    target: str | Path | None = None,
    outtype: str = "auto",
    notice: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Convert a checkpoint folder to a GGUF file and return the file's path.

    target: default `<folder's name>-<TYPE>.gguf` here. outtype: one of OUTTYPES; "auto" keeps the
    checkpoint's own precision. `notice` is told what the file cannot say to llama.cpp, `progress`
    the bytes done and in all. Raises UnsupportedModel, InvalidFile or InvalidInput; nothing is
    half-written then.
    """
    source = Checkpoint(checkpoint)
    plan = plan_for(source)
    block = output_type(plan, outtype)
    folder = Path(checkpoint).resolve()
    path = Path(target) if target is not None else Path(f"{folder.name}-{block.name}.gguf")
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder; name the file to write")
    for remark in plan.remarks:
        notice(remark)
    write_gguf(path, plan, metadata_for(source, plan, folder.name, block, notice), block, progress)
    return path


def plan_for(checkpoint: Checkpoint) -> Plan:
    """Ask the architecture of the checkpoint's model_type how to convert it."""
    kind = checkpoint.config.get("model_type")
    modules = [importlib.import_module(f".{name}", __package__) for name in _ARCHITECTURES]
    for module in modules:
        if kind in module.MODEL_TYPES:
            return module.plan(checkpoint)
    known = ", ".join(sorted(name for module in modules for name in module.MODEL_TYPES))
    raise UnsupportedModel(
        f"{checkpoint.config.path}: the model_type {kind!r} is not known; keelback converts {known}"
    )


def output_type(plan: Plan, outtype: str) -> BlockFormat:
    """The type of the matrices; "auto" takes that of the checkpoint's largest tensor."""
    if outtype not in OUTTYPES:
        raise InvalidInput(
            f"the type {outtype!r} cannot be written; choose one of {', '.join(OUTTYPES)}"
        )
    if outtype != "auto":
        return BY_NAME[outtype.upper()]
    kind = plan.tensors[0].sources[0].kind
    return BY_NAME["F32" if kind == "F64" else kind]


def metadata_for(
    checkpoint: Checkpoint, plan: Plan, name: str, block: BlockFormat, notice: Callable[[str], None]
) -> dict[str, Any]:
    """All pairs of the file but the architecture, which the writer adds."""
    tokenizer = read_tokenizer(checkpoint.folder, plan.keys["vocab_size"])
    if tokenizer["tokenizer.ggml.model"] == "none":
        notice("the checkpoint has no tokenizer; the model will run on token ids only")
    return {
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[block.name],
        "general.quantization_version": QUANTIZATION_VERSION,
        **_sampling_defaults(checkpoint.folder / "generation_config.json"),
        **{f"{plan.architecture}.{key}": value for key, value in plan.keys.items()},
        **tokenizer,
    }


def _sampling_defaults(path: Path) -> dict[str, Any]:
    """`general.sampling.*` from generation_config.json, where it says something."""
    values = read_json(path) if path.exists() else {}
    pairs: dict[str, Any] = {}
    for theirs, ours in _SAMPLING.items():
        value = values.get(theirs)
        if isinstance(value, int | float) and not isinstance(value, bool):
            pairs[f"general.sampling.{ours}"] = int(value) if ours == "top_k" else float(value)
    return pairs
