"""The layouts in which checkpoints of one model are found, brought to the one of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidFile, UnsupportedModel
from .config import Config, read_json


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint is to be read: its config and its tensors' names as transformers has them.

    block: rows and columns that share a factor in a float8 matrix.
    """

    config: Config
    rename: Callable[[str], str] = str
    block: tuple[int, int] = (128, 128)


def recognise(folder: Path) -> Layout:
    """The layout of a checkpoint's folder.

    Raises InvalidFile for a folder without config, UnsupportedModel for adapters and for weights
    that are quantized in a way that cannot be converted.
    """
    path = folder / "config.json"
    if not path.exists():
        if (folder / "adapter_config.json").exists():
            raise UnsupportedModel(
                f"{folder} holds an adapter (LoRA); merge it into its base model first"
            )
        raise InvalidFile(f"{folder} has no config.json; it is no Hugging Face checkpoint")
    values = read_json(path)
    return Layout(Config(path, values), block=_block(folder, values))


def _block(folder: Path, values: dict[str, Any]) -> tuple[int, int]:
    """The blocks of float8 matrices; other quantizations are refused."""
    quantized = values.get("quantization_config") or values.get("quantization") or {}
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if quantized and method != "fp8":
        raise UnsupportedModel(
            f"{folder} is quantized already ({method}); convert the original checkpoint, "
            "and choose a smaller type with --outtype"
        )
    rows, columns = quantized.get("weight_block_size") or (128, 128)
    return rows, columns
