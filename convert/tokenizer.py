"""The `tokenizer.*` pairs of a GGUF from a checkpoint's tokenizer files, of whatever kind they are.

Names and meanings are llama.cpp's. Whatever GGUF has no way to say is refused with a sentence: a
vocabulary that almost fits makes a model that almost works. Nothing that comes with a checkpoint
is executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidInput, UnsupportedModel, refuse_panics
from .byte_level import from_json, from_vocab_and_merges
from .config import read_json
from .ranks import FILES as RANKS
from .ranks import PATTERNS, from_tekken, from_tiktoken
from .sentencepieces import from_metaspace, from_sentencepiece
from .tokenizer_settings import FILES as SETTINGS
from .tokenizer_settings import Settings

# Vocabularies in forms that say too little about how text is split to be converted.
_FOREIGN = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "rwkv_vocab_v20230424.txt")
#: The files of a folder that are read for its tokenizer, or stand in the way of one.
FILES = ("tokenizer.json", "tokenizer.model", "*.model.v*", *RANKS, *_FOREIGN, *SETTINGS)
# Mistral's own: the version stands for the layout of a conversation, not of the file.
_VERSIONED = re.compile(r".+\.model\.v(\d{1,3})(?:m\d{1,3})?")

Notice = Callable[[str], None]
Reader = Callable[[Path, Settings, int, Notice], dict[str, Any]]


@refuse_panics
def read_tokenizer(
    folder: Path,
    vocab_size: int,
    notice: Notice = lambda text: None,
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """The `tokenizer.*` pairs of a checkpoint folder, padded to `vocab_size` tokens.

    With `tokenizer`, a folder or one of the files below, the vocabulary is taken from there: many
    an original checkpoint has none. `notice` is told what a file does that GGUF cannot say and
    that matters little.
    Values are str, bool, int (u32), list[str], list[int] (i32) or list[float] (f32). A folder
    without a tokenizer gives the model "none". Raises UnsupportedModel, InvalidFile, InvalidInput.
    """
    place = folder if tokenizer is None else tokenizer
    is_folder = os.path.isdir(place)
    settings = Settings(place if is_folder else place.parent, folder)
    found = _find(place) if is_folder else _of_file(place)
    if found is not None:
        reader, path = found
        return reader(path, settings, vocab_size, notice)
    if tokenizer is not None:
        if not os.path.exists(tokenizer):
            raise InvalidInput(f"{tokenizer}: there is no such tokenizer; name a folder or a file")
        raise InvalidInput(f"{tokenizer} is no tokenizer keelback can convert, and holds none")
    for name in _FOREIGN:
        if (folder / name).is_file():
            raise UnsupportedModel(
                f"{folder / name} is a tokenizer keelback cannot convert; save a tokenizer.json "
                "with transformers (AutoTokenizer.from_pretrained, then save_pretrained)"
            )
    ids = settings.special_ids([f"[{token}]" for token in range(vocab_size)])
    ends = {f"tokenizer.ggml.{kind}_token_id": token for kind, token in ids.items()}
    return {"tokenizer.ggml.model": "none", **ends}


def _find(folder: Path) -> tuple[Reader, Path] | None:
    """The file that says most about a folder's tokenizer, and what reads it."""
    versioned = sorted(path for path in folder.glob("*.model.v*") if _version(path.name))
    versioned.sort(key=lambda path: _version(path.name))
    own = [folder / "tokenizer.model", *versioned[-1:]]
    others = [folder / name for name in ("tekken.json", *PATTERNS, "vocab.json")]
    for path in (folder / "tokenizer.json", *own, *others):
        found = _of_file(path) if path.is_file() else None
        # What SentencePiece itself wrote is nearer to the model than what was made from it.
        if found is not None and found[0] is from_metaspace:
            found = next((_of_file(model) for model in own if model.is_file()), found)
        if found is not None:
            return found
    return None


def _of_file(path: Path) -> tuple[Reader, Path] | None:
    """What reads a file, by its name; None where nothing does."""
    if path.name.startswith("tekken") and path.suffix == ".json":
        return from_tekken, path
    if path.name == "vocab.json":
        return (from_vocab_and_merges, path) if (path.parent / "merges.txt").is_file() else None
    if path.suffix == ".json":
        model = read_json(path).get("model")
        falls_back = isinstance(model, dict) and bool(model.get("byte_fallback"))
        return (from_metaspace if falls_back else from_json), path
    if path.name in PATTERNS:
        return from_tiktoken, path
    if path.suffix == ".model" or _version(path.name):
        return from_sentencepiece, path
    return None


def _version(name: str) -> int:
    """The number of a versioned SentencePiece model; 0 for other files."""
    found = _VERSIONED.fullmatch(name)
    return int(found[1]) if found else 0
