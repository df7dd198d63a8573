"""What a model file holds, told without loading its weights."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from .. import models
from ..kernels.errors import InvalidFile, UnsupportedModel
from ..kernels.formats.gguf import GGUF
from ..kernels.formats.metadata import Metadata
from .state import Layout
from .tokenizer import Tokenizer

#: Characters of a name that are shown; a stranger's may be as long as the file.
LONGEST_TEXT = 200


def open_file(path: str | Path) -> GGUF:
    """A model file, or the embedded one by the name "demo"."""
    return GGUF(models.DEMO if str(path) == "demo" else path)


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a model file."""
    file = open_file(path)
    return Tokenizer.from_metadata(file.metadata, file.path)


def tokenizer_of(file: GGUF, vocabulary: int) -> Tokenizer:
    """The tokenizer of an open file; raises InvalidFile for one of another size than the model."""
    tokenizer = Tokenizer.from_metadata(file.metadata, file.path)
    if tokenizer.kind != "none" and tokenizer.vocab_size != vocabulary:
        raise InvalidFile(
            f"{file.path} has {tokenizer.vocab_size} tokens and {vocabulary} rows of embeddings; "
            "convert or download the model again"
        )
    return tokenizer


def describe(path: str) -> dict[str, Any]:
    """Facts about a model file, ready for JSON; a model that cannot be run has no state's size."""
    file = open_file(path)
    types = Counter(info.block.name for info in file.tensors.values())
    metadata = file.metadata
    return {
        "file": str(file.path),
        "name": _text(metadata, "general.name"),
        "architecture": _text(metadata, "general.architecture"),
        "parameters": sum(math.prod(info.shape) for info in file.tensors.values()),
        "file_bytes": file.nbytes,
        "parts": len(file.parts),
        "types": dict(types.most_common()),
        "tokenizer": {
            "model": _text(metadata, "tokenizer.ggml.model") or "none",
            "pre": _text(metadata, "tokenizer.ggml.pre"),
            "tokens": metadata.length("tokenizer.ggml.tokens"),
        },
        "chat_template": "tokenizer.chat_template" in metadata,
        "state_bytes": _state_bytes(file),
        "tensors": [
            {
                "name": info.name,
                "type": info.block.name,
                "shape": list(info.shape),
                "bytes": info.nbytes,
            }
            for info in file.tensors.values()
        ],
    }


def _text(metadata: Metadata, key: str) -> str:
    value = metadata.get(key)
    return value[:LONGEST_TEXT] if isinstance(value, str) else ""


def _state_bytes(file: GGUF) -> dict[str, int] | None:
    """What a sequence takes, fixed and for every token."""
    try:
        layout = Layout.of(models.build(file.metadata, file.tensors, file.path))
    except UnsupportedModel:
        return None
    return {"fixed": layout.fixed_bytes, "per_token": layout.bytes_per_token}
