"""Text to token ids and back, rebuilt from a GGUF's metadata alone.

Special tokens are cut out here; engine/byte_level.py and splitters.py do the text between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidInput, UnsupportedModel
from ..kernels.formats import pretokenizers
from ..kernels.formats.spm import TokenType
from .byte_level import byte_level_splitter
from .splitters import BYTE_TEXTS, TYPES, Keys, Splitter, find_row, sentencepiece_splitter

_MODEL, _TOKENS = "tokenizer.ggml.model", "tokenizer.ggml.tokens"
# What llama.cpp takes for BOS and EOS where a file names none.
_DEFAULT_IDS = {"gpt2": {"bos": 11, "eos": 11}, "llama": {"bos": 1, "eos": 2}}
_ENDS_BY_KEY = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# All of them become one regular expression.
_MOST_SPECIAL = 1 << 16


class Tokenizer:
    """A vocabulary: `encode` text to ids, `decode` ids to text, `piece` for the bytes of one id.

    `kind` is "gpt2" (byte-level BPE), "llama" (SentencePiece BPE) or "none": without a vocabulary
    text is ids, separated by spaces.
    `eog_ids` end a generation. `bos_id` and `eos_id` are None where a vocabulary has none.
    """

    def __init__(self, keys: Keys, kind: str, texts: list[str], types: list[int]) -> None:
        self.kind, self._path, self._texts, self._types = kind, keys.path, texts, types
        architecture = keys.get("general.architecture", str, "")
        self.vocab_size = len(texts) or keys.get(f"{architecture}.vocab_size", int, 0)
        self.chat_template: str | None = keys.get("tokenizer.chat_template", str, None)
        ids = dict(zip(texts, range(len(texts)), strict=True))
        if len(ids) != len(texts):
            raise keys.broken(_TOKENS, "holds a token twice")
        defaults = _DEFAULT_IDS.get(kind, {})
        self.bos_id = self._special_id(keys, "bos", defaults.get("bos"))
        self.eos_id = self._special_id(keys, "eos", defaults.get("eos"))
        self.eog_ids = self._find_ends(keys, ids)
        self._split: Splitter = _no_ids
        add_bos = kind == "llama"
        if kind == "gpt2":
            row = find_row(keys)
            add_bos = row.add_bos
            self._split = byte_level_splitter(keys, row, ids, types)
        elif kind == "llama":
            self._split = sentencepiece_splitter(keys, texts, types)
        self._front = _added(keys, "bos", self.bos_id, add_bos)
        self._behind = _added(keys, "eos", self.eos_id, False)
        self.add_bos, self.add_eos = bool(self._front), bool(self._behind)
        self._strips_space = kind == "llama" and keys.get(
            "tokenizer.ggml.add_space_prefix", bool, True
        )
        plain = [int(TokenType.NORMAL), int(TokenType.UNUSED), int(TokenType.BYTE)]
        odd = np.flatnonzero(~np.isin(np.array(types, np.int64), plain))
        special = [texts[i] for i in odd]
        user_defined = [text for text in special if types[ids[text]] == TokenType.USER_DEFINED]
        if len(special) > _MOST_SPECIAL:
            raise keys.broken(TYPES, f"marks {len(special)} tokens as special ones")
        self._special_ids = {text: ids[text] for text in special}
        self._user_defined_pattern, self._special_pattern = map(_any_of, (user_defined, special))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: Path) -> Tokenizer:
        """The tokenizer a GGUF describes; `path` is for messages.

        Raises InvalidFile for metadata that contradict themselves, UnsupportedModel for a kind of
        tokenizer or a pre-tokenizer keelback does not know.
        """
        keys = Keys(metadata, path)
        kind = keys.get(_MODEL, str)
        if kind in ("none", "no_vocab"):
            return cls(keys, "none", [], [])
        if kind not in ("gpt2", "llama"):
            raise UnsupportedModel(
                f"{path}: {_MODEL} is {kind!r}; keelback reads gpt2 (byte-level BPE) and llama "
                "(SentencePiece)"
            )
        texts = keys.strings(_TOKENS)
        if "" in texts:
            texts = [text or f"[EMPTY_{token}]" for token, text in enumerate(texts)]
        if not texts:
            raise keys.broken(_TOKENS, "holds no token at all")
        missing = [int(TokenType.NORMAL)] * len(texts) if kind == "gpt2" else None
        types = keys.numbers(TYPES, len(texts), missing)
        if not set(types) <= set(TokenType):
            raise keys.broken(TYPES, "holds a type that is none of 1 to 6")
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

    def shown(self, token: int) -> str:
        """The text of one id, for a reader: bytes that are no text by themselves are escaped."""
        return self.piece(token, skip_special=False).decode("utf-8", "backslashreplace")

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
            return BYTE_TEXTS.get(text, text.encode())
        if self.kind == "llama":
            return text.replace("▁", " ").encode()
        symbols = pretokenizers.BYTES
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

    def _special_id(self, keys: Keys, name: str, default: int | None = None) -> int | None:
        """The id under a key. A default counts only where that token is a control token."""
        key = f"tokenizer.ggml.{name}_token_id"
        token = keys.get(key, int, None)
        if token is None:
            if default is None or default >= self.vocab_size:
                return None
            return default if self._types[default] == TokenType.CONTROL else None
        if token < 0 or (token >= self.vocab_size and self.kind != "none"):
            raise keys.broken(key, f"is {token}, and there are {self.vocab_size} tokens")
        return token

    def _find_ends(self, keys: Keys, ids: Mapping[str, int]) -> frozenset[int]:
        """The ids that end a generation, by key and by text; the texts become control tokens.

        An ordinary piece that no key names is never taken for an end: Qwen's vocabulary happens to
        hold "</s>".
        """
        ends = {name: self._special_id(keys, name) for name in _ENDS_BY_KEY}
        ends["eos"] = self.eos_id
        named = {token for token in ends.values() if token is not None}

        def marked(text: str) -> bool:
            token = ids.get(text)
            return token is not None and (token in named or self._types[token] != TokenType.NORMAL)

        texts = list(filter(marked, pretokenizers.END_TEXTS))
        for name, candidates in pretokenizers.FILL_END_TEXTS.items():
            if ends[name] is None:
                texts += list(filter(marked, candidates))[:1]
        # Two families use such a text for something else.
        calls = not {"<|call|>", "<|calls|>"}.isdisjoint(texts)
        if calls and not {"<|return|>", "<|flush|>"}.isdisjoint(texts):
            texts = [text for text in texts if text != "<|end|>"]
        if "<|tool_response>" in texts:
            texts = [text for text in texts if text != "</s>"]
        for text in texts:
            self._types[ids[text]] = TokenType.CONTROL
        return frozenset(named | {ids[text] for text in texts})


def _added(keys: Keys, name: str, token: int | None, default: bool) -> list[int]:
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


def _any_of(texts: list[str]) -> re.Pattern[str]:
    """Matches the longest of the texts; without any, matches nothing."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
