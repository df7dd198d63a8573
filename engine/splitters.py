"""What turns a segment of plain text into ids, from metadata: SentencePiece, and what it shares
with byte-level BPE (engine/byte_level.py).

`sentencepiece` is imported when a file needs it. Files come from strangers: counts and lengths have
bounds before anything is built from them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile, InvalidInput, UnsupportedModel
from ..kernels.formats import pretokenizers, spm
from ..kernels.formats.spm import TokenType

# Ids of a segment of plain text; the flag says whether it is the first of the whole text.
Splitter = Callable[[str, bool], list[int]]

TYPES, SCORES = "tokenizer.ggml.token_type", "tokenizer.ggml.scores"
_TOKENS, _PRE = "tokenizer.ggml.tokens", "tokenizer.ggml.pre"
_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
# Of keelback's own files: what a name or a default does not say. llama.cpp steps over them.
_NORMALIZER, _IGNORE_MERGES = "tokenizer.ggml.normalizer", "tokenizer.ggml.ignore_merges"
_SCHEME = "tokenizer.ggml.prepend_scheme"
BYTE_TEXTS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}

# Several times the largest vocabularies there are, and the longest tokens.
_MOST_STRINGS, _LONGEST_STRING = 1 << 21, 1 << 13
# Beyond this the patterns of a pre-tokenizer give up inside one run of letters or of spaces.
_LONGEST_RUN = 1 << 20


class Keys:
    """Metadata of a file, read with the type each key must have."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.metadata, self.path = metadata, path

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """A value, or the default where the key is missing; without one it must be there."""
        if key not in self.metadata and default:
            return default[0]
        value = self.metadata.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.broken(key, f"is {'missing' if value is None else 'no ' + kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of texts, of a number and of lengths that a vocabulary can have."""
        # A GGUF's metadata know how long an array is before it is decoded.
        count = getattr(self.metadata, "length", lambda key: 0)(key) or 0
        values = [] if count > _MOST_STRINGS else self.get(key, list)
        count = max(count, len(values))
        if count > _MOST_STRINGS:
            raise self.broken(key, f"holds {count} texts, more than any vocabulary")
        try:
            joined = "".join(values)
        except TypeError:
            raise self.broken(key, "holds something other than text") from None
        if max(map(len, values), default=0) > _LONGEST_STRING:
            raise self.broken(key, f"holds a text of more than {_LONGEST_STRING} characters")
        if not _is_unicode(joined):
            raise self.broken(key, "holds half a surrogate pair")
        return values

    def numbers(self, key: str, count: int, missing: list[int] | None) -> list[Any]:
        """An array of `count` finite numbers, or `missing` where there is none."""
        if key not in self.metadata and missing is not None:
            return missing
        try:
            values = np.asarray(self.metadata.get(key, []))
        except ValueError:  # a list of lists of many lengths
            values = np.empty(0)
        if values.shape != (count,) or values.dtype.kind not in "iuf":
            raise self.broken(key, f"is no array of {count} numbers, one for every token")
        with np.errstate(over="ignore"):  # a double may be none of the floats it becomes
            finite = np.isfinite(values.astype(np.float32)).all()
        if not finite:
            raise self.broken(key, "holds a number that is not finite")
        return values.tolist()

    def broken(self, key: str, what: str) -> InvalidFile:
        return InvalidFile(f"{self.path}: {key} {what}; convert or download the model again")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_row(keys: Keys) -> pretokenizers.PreTokenizer:
    """The row of the file's pre-tokenizer, with what the file says otherwise."""
    name = keys.get(_PRE, str, None)
    if name is None:
        warnings.warn(
            f"{keys.path} does not name its pre-tokenizer ({_PRE}); 'default' is taken, which may "
            "split text otherwise than the model is used to. Convert the model again",
            stacklevel=4,
        )
    row = pretokenizers.find(name or "default")
    if row is None:
        raise UnsupportedModel(
            f"{keys.path}: {_PRE} is {name!r}, which keelback does not know; convert the "
            "checkpoint with keelback, or give token ids"
        )
    normalizer = keys.get(_NORMALIZER, str, row.normalizer or "none")
    if normalizer not in ("NFC", "none"):
        raise UnsupportedModel(
            f"{keys.path}: {_NORMALIZER} is {normalizer!r}; keelback knows NFC and none"
        )
    return replace(
        row,
        normalizer=None if normalizer == "none" else normalizer,
        ignore_merges=keys.get(_IGNORE_MERGES, bool, row.ignore_merges),
    )


def check_runs(text: str) -> None:
    """Raise InvalidInput for text with a run that the patterns of pre-tokenizers do not survive."""
    if len(text) <= _LONGEST_RUN:
        return
    if any(len(run) > _LONGEST_RUN for run in re.findall(r"\s+|\S+", text)):
        raise InvalidInput(
            f"the text holds more than {_LONGEST_RUN} spaces, or characters without a space, in a "
            "row; break it up"
        )


def sentencepiece_splitter(keys: Keys, texts: list[str], types: list[int]) -> Splitter:
    """SentencePiece, from a model file written on the spot.

    A segment gets a space in front as `prepend_scheme` says: "always", as llama.cpp does it and
    transformers with "legacy"; "first", only at the very start of a text; and either of them
    behind "metaspace-", never where a space is there already.
    """
    scores = keys.numbers(SCORES, len(texts), None)
    model = spm.SentencePieceModel(
        pieces=_pieces(keys, texts, types, scores),
        model_type=spm.BPE,
        byte_fallback=TokenType.BYTE in types,
        unk_id=_unknown(keys, len(texts)),
        remove_extra_whitespaces=keys.get("tokenizer.ggml.remove_extra_whitespaces", bool, False),
    )
    prefix = keys.get(_SPACE_PREFIX, bool, True)
    scheme = keys.get(_SCHEME, str, "always")
    sparing, when = scheme.startswith("metaspace-"), scheme.removeprefix("metaspace-")
    if when not in ("always", "first"):
        raise UnsupportedModel(
            f"{keys.path}: {_SCHEME} is {scheme!r}; keelback knows always and first"
        )

    @cache
    def processor(add_dummy_prefix: bool) -> Any:
        from sentencepiece import SentencePieceProcessor

        model.add_dummy_prefix = add_dummy_prefix
        try:
            return SentencePieceProcessor(model_proto=spm.serialise(model))
        except (OSError, RuntimeError) as error:
            raise keys.broken(_TOKENS, f"is refused by SentencePiece ({error})") from None

    processor(prefix)

    def split(text: str, first: bool) -> list[int]:
        spaced = prefix and (first or when == "always")
        return processor(spaced and not (sparing and text[0] in " ▁")).encode(text)

    return split


def _unknown(keys: Keys, count: int) -> int:
    unknown = keys.get("tokenizer.ggml.unknown_token_id", int, 0)
    if not 0 <= unknown < count:
        raise keys.broken("tokenizer.ggml.unknown_token_id", f"is {unknown}, which is no token")
    return unknown


def _pieces(keys: Keys, texts: list[str], types: list[int], scores: list[float]) -> list[spm.Piece]:
    # Some converters mark padding as unknown too; SentencePiece wants exactly one such piece.
    kinds = [TokenType.CONTROL if kind == TokenType.UNKNOWN else TokenType(kind) for kind in types]
    kinds[_unknown(keys, len(texts))] = TokenType.UNKNOWN
    found = {text for text, kind in zip(texts, kinds, strict=True) if kind == TokenType.BYTE}
    if found and found != BYTE_TEXTS.keys():
        raise keys.broken(TYPES, "marks byte tokens other than <0x00> to <0xFF>")
    return [spm.Piece(*piece) for piece in zip(texts, map(float, scores), kinds, strict=True)]
