"""Text to token ids and back, rebuilt from a GGUF's metadata alone.

Byte-level BPE runs in `tokenizers`, SentencePiece in `sentencepiece`; each is imported when a file
needs it. Special tokens are cut out here, before either of them sees the text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile, InvalidInput, UnsupportedModel
from ..kernels.formats import pretokenizers, spm
from ..kernels.formats.spm import TokenType

# Ids of a segment of plain text; the flag says whether it is the first of the whole text.
Splitter = Callable[[str, bool], list[int]]

_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_TOKENS, _TYPES, _SCORES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores"))
_MERGES, _SPACE_PREFIX = "tokenizer.ggml.merges", "tokenizer.ggml.add_space_prefix"
# What llama.cpp takes for BOS and EOS where a file names none.
_DEFAULT_IDS = {"gpt2": {"bos": 11, "eos": 11}, "llama": {"bos": 1, "eos": 2}}
_ENDS_BY_KEY = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_BYTE_TEXTS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


class Tokenizer:
    """A vocabulary: `encode` text to ids, `decode` ids to text, `piece` for the bytes of one id.

    `kind` is "gpt2" (byte-level BPE), "llama" (SentencePiece BPE) or "none": without a vocabulary
    text is ids, separated by spaces.
    `eog_ids` end a generation. `bos_id` and `eos_id` are None where a vocabulary has none.
    """

    def __init__(self, keys: _Keys, kind: str, texts: list[str], types: list[int]) -> None:
        self.kind, self._path, self._texts, self._types = kind, keys.path, texts, types
        architecture = keys.get("general.architecture", str, "")
        self.vocab_size = len(texts) or keys.get(f"{architecture}.vocab_size", int, 0)
        self.chat_template: str | None = keys.get("tokenizer.chat_template", str, None)
        ids = {text: token for token, text in enumerate(texts)}
        defaults = _DEFAULT_IDS.get(kind, {})
        self.bos_id = self._special_id(keys, "bos", defaults.get("bos"))
        self.eos_id = self._special_id(keys, "eos", defaults.get("eos"))
        self.eog_ids = self._find_ends(keys, ids)
        self._split: Splitter = _no_ids
        add_bos = kind == "llama"
        if kind == "gpt2":
            row = _find_row(keys)
            add_bos = row.add_bos
            self._split = _byte_level_splitter(keys, row, ids, types)
        elif kind == "llama":
            self._split = _sentencepiece_splitter(keys, texts, types)
        self._front = _added(keys, "bos", self.bos_id, add_bos)
        self._behind = _added(keys, "eos", self.eos_id, False)
        self.add_bos, self.add_eos = bool(self._front), bool(self._behind)
        self._strips_space = kind == "llama" and keys.get(_SPACE_PREFIX, bool, True)
        user_defined = [text for text in texts if types[ids[text]] == TokenType.USER_DEFINED]
        controls = (TokenType.CONTROL, TokenType.UNKNOWN)
        special = user_defined + [text for text in texts if types[ids[text]] in controls]
        self._special_ids = {text: ids[text] for text in special}
        self._user_defined_pattern, self._special_pattern = map(_any_of, (user_defined, special))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: Path) -> Tokenizer:
        """The tokenizer a GGUF describes; `path` is for messages.

        Raises InvalidFile for metadata that contradict themselves, UnsupportedModel for a kind of
        tokenizer or a pre-tokenizer keelback does not know.
        """
        keys = _Keys(metadata, path)
        kind = keys.get(_MODEL, str)
        if kind in ("none", "no_vocab"):
            return cls(keys, "none", [], [])
        if kind not in ("gpt2", "llama"):
            raise UnsupportedModel(
                f"{path}: {_MODEL} is {kind!r}; keelback reads gpt2 (byte-level BPE) and llama "
                "(SentencePiece)"
            )
        texts = keys.strings(_TOKENS)
        texts = [text or f"[EMPTY_{token}]" for token, text in enumerate(texts)]
        if len(set(texts)) != len(texts) or not texts:
            raise keys.broken(_TOKENS, "holds a token twice, or none at all")
        missing = [int(TokenType.NORMAL)] * len(texts) if kind == "gpt2" else None
        types = keys.numbers(_TYPES, len(texts), missing)
        if not set(types) <= set(TokenType):
            raise keys.broken(_TYPES, "holds a type that is none of 1 to 6")
        return cls(keys, kind, texts, types)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of a text, with BOS and EOS where the file asks for them and `add_special` allows it.

        Without `parse_special` the texts of control tokens are plain text (what a stranger wrote).
        """
        return self.encode_parts([(text, parse_special)], add_special)

    def encode_parts(
        self, parts: Iterable[tuple[str, bool]], add_special: bool = True
    ) -> list[int]:
        """`encode` for a text that comes in parts, each with its own `parse_special`.

        No control token is put together from two parts; plain text goes on from one to the next.
        """
        parts = list(parts)
        if self.kind == "none":
            return self._spelled_ids("".join(text for text, _ in parts))
        ids, plain, first = list(self._front) if add_special else [], "", True
        for text, parse_special in parts:
            at = 0
            for match in self._special_pattern.finditer(text) if parse_special else ():
                ids += self._plain_ids(plain + text[at : match.start()], first)
                ids.append(self._special_ids[match.group()])
                plain, first, at = "", False, match.end()
            plain += text[at:]
        ids += self._plain_ids(plain, first)
        return ids + self._behind if add_special else ids

    def _plain_ids(self, text: str, first: bool) -> list[int]:
        """Ids of text without control tokens; `first` says that nothing comes before it."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidInput("the text holds half a surrogate pair, which no token has") from None
        ids, at = list[int](), 0
        for match in self._user_defined_pattern.finditer(text):
            if match.start() > at:
                ids += self._split(text[at : match.start()], first and at == 0)
            ids.append(self._special_ids[match.group()])
            at = match.end()
        return ids + self._split(text[at:], first and at == 0) if at < len(text) else ids

    @property
    def control_texts(self) -> list[str]:
        """The texts that are control tokens where `parse_special` says so."""
        plain = TokenType.USER_DEFINED
        return [text for text, token in self._special_ids.items() if self._types[token] != plain]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD.

        Control and unknown tokens have no text unless `skip_special` is False.
        """
        text = b"".join(self.piece(token, skip_special) for token in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strips_space else text

    def piece(self, token: int, skip_special: bool = True) -> bytes:
        """The bytes one id adds to a stream; pieces may end inside a character."""
        if self.kind == "none":
            return f"{token} ".encode()
        if not 0 <= token < self.vocab_size:
            raise InvalidInput(
                f"the id {token} is none of the vocabulary's 0 to {self.vocab_size - 1}"
            )
        text, kind = self._texts[token], self._types[token]
        if kind == TokenType.UNUSED:
            return b""
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            return b"" if skip_special else text.encode()
        if kind == TokenType.BYTE:
            return _BYTE_TEXTS.get(text, text.encode())
        if self.kind == "llama":
            return text.replace("▁", " ").encode()
        symbols = _bytes_of_symbols()
        if kind == TokenType.USER_DEFINED or not symbols.keys() >= set(text):
            return text.encode()
        return bytes(symbols[symbol] for symbol in text)

    def _spelled_ids(self, text: str) -> list[int]:
        words = text.replace(",", " ").split()
        if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
            raise InvalidInput(
                f"{self._path} holds no tokenizer: write token ids, separated by spaces"
            )
        return [int(word) for word in words]

    def _special_id(self, keys: _Keys, name: str, default: int | None = None) -> int | None:
        """The id under a key. A default counts only where that token is a control token."""
        key = f"tokenizer.ggml.{name}_token_id"
        token = keys.get(key, int, None)
        if token is None:
            if default is None or default >= self.vocab_size:
                return None
            return default if self._types[default] == TokenType.CONTROL else None
        if not 0 <= token < self.vocab_size and self.kind != "none":
            raise keys.broken(key, f"is {token}, and there are {self.vocab_size} tokens")
        return token

    def _find_ends(self, keys: _Keys, ids: Mapping[str, int]) -> frozenset[int]:
        """The ids that end a generation, by key and by text; the texts become control tokens.

        An ordinary piece is never taken for an end: Qwen's vocabulary happens to hold "</s>".
        """
        ends = {name: self._special_id(keys, name) for name in _ENDS_BY_KEY}
        ends["eos"] = self.eos_id
        marked = {text for text in ids if self._types[ids[text]] != TokenType.NORMAL}
        texts = [text for text in pretokenizers.END_TEXTS if text in marked]
        for name, candidates in pretokenizers.FILL_END_TEXTS.items():
            if ends[name] is None:
                texts += [text for text in candidates if text in marked][:1]
        # Two families use such a text for something else.
        calls = not {"<|call|>", "<|calls|>"}.isdisjoint(texts)
        if calls and not {"<|return|>", "<|flush|>"}.isdisjoint(texts):
            texts = [text for text in texts if text != "<|end|>"]
        if "<|tool_response>" in texts:
            texts = [text for text in texts if text != "</s>"]
        for text in texts:
            self._types[ids[text]] = TokenType.CONTROL
        by_key = {token for token in ends.values() if token is not None}
        return frozenset(by_key | {ids[text] for text in texts})


class _Keys:
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
        values = self.get(key, list)
        if not all(isinstance(value, str) for value in values):
            raise self.broken(key, "holds something other than text")
        return values

    def numbers(self, key: str, count: int, missing: list[int] | None) -> list[Any]:
        """An array of `count` finite numbers, or `missing` where there is none."""
        if key not in self.metadata and missing is not None:
            return missing
        values = np.asarray(self.metadata.get(key, []))
        if values.shape != (count,) or values.dtype.kind not in "iuf":
            raise self.broken(key, f"is no array of {count} numbers, one for every token")
        if not np.isfinite(values).all():
            raise self.broken(key, "holds a number that is not finite")
        return values.tolist()

    def broken(self, key: str, what: str) -> InvalidFile:
        return InvalidFile(f"{self.path}: {key} {what}; convert or download the model again")


def _added(keys: _Keys, name: str, token: int | None, default: bool) -> list[int]:
    """BOS or EOS where a file wants it added to a text, else nothing; it must exist."""
    key = f"tokenizer.ggml.add_{name}_token"
    if not keys.get(key, bool, default):
        return []
    if token is None:
        raise keys.broken(
            key, f"asks for a token that tokenizer.ggml.{name}_token_id does not name"
        )
    return [token]


def _no_ids(_text: str, _first: bool) -> list[int]:
    return []


def _find_row(keys: _Keys) -> pretokenizers.PreTokenizer:
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
    return row


def _byte_level_splitter(
    keys: _Keys, row: pretokenizers.PreTokenizer, ids: Mapping[str, int], types: list[int]
) -> Splitter:
    """Byte-level BPE in `tokenizers`. Tokens that no merge makes are only reached as specials."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    vocabulary = {text: token for text, token in ids.items() if types[token] == TokenType.NORMAL}
    merges = []
    for merge in keys.strings(_MERGES):
        left, _, right = merge.partition(" ")
        for text in (left, right, left + right):
            if text not in ids or not (left and right):
                raise keys.broken(_MERGES, f"holds {merge!r}, which joins no two tokens to a third")
            vocabulary[text] = ids[text]
        merges.append((left, right))
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=row.ignore_merges))
    normalizer, backend.pre_tokenizer = pretokenizers.build(row)
    if normalizer is not None:
        backend.normalizer = normalizer

    def split(text: str, _first: bool) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    return split


def _sentencepiece_splitter(keys: _Keys, texts: list[str], types: list[int]) -> Splitter:
    """SentencePiece, from a model file written on the spot; only the first segment gets a space."""
    scores = keys.numbers(_SCORES, len(texts), None)
    # Some converters mark padding as unknown too; SentencePiece wants exactly one such piece.
    unknown = keys.get("tokenizer.ggml.unknown_token_id", int, 0)
    if not 0 <= unknown < len(texts):
        raise keys.broken("tokenizer.ggml.unknown_token_id", f"is {unknown}, which is no token")
    kinds = [TokenType.CONTROL if kind == TokenType.UNKNOWN else TokenType(kind) for kind in types]
    kinds[unknown] = TokenType.UNKNOWN
    found = {text for text, kind in zip(texts, kinds, strict=True) if kind == TokenType.BYTE}
    if found and found != _BYTE_TEXTS.keys():
        raise keys.broken(_TYPES, "marks byte tokens other than <0x00> to <0xFF>")
    model = spm.SentencePieceModel(
        pieces=[spm.Piece(*piece) for piece in zip(texts, map(float, scores), kinds, strict=True)],
        model_type=spm.BPE,
        byte_fallback=bool(found),
        unk_id=unknown,
        remove_extra_whitespaces=keys.get("tokenizer.ggml.remove_extra_whitespaces", bool, False),
    )
    prefix = keys.get(_SPACE_PREFIX, bool, True)

    @cache
    def processor(add_dummy_prefix: bool) -> Any:
        from sentencepiece import SentencePieceProcessor

        model.add_dummy_prefix = add_dummy_prefix
        try:
            return SentencePieceProcessor(model_proto=spm.serialise(model))
        except (OSError, RuntimeError) as error:
            raise keys.broken(_TOKENS, f"is refused by SentencePiece ({error})") from None

    processor(prefix)
    return lambda text, first: processor(prefix and first).encode(text)


def _any_of(texts: list[str]) -> re.Pattern[str]:
    """Matches the longest of the texts; without any, matches nothing."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@cache
def _bytes_of_symbols() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    return symbols | {chr(0x100 + place): byte for place, byte in enumerate(others)}
