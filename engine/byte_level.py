"""Byte-level BPE, by `tokenizers`, which is imported when a file needs it.

That library takes half a second to read a vocabulary of 250,000 tokens. What becomes of a word
depends only on the tokens and merges that are parts of it, so short texts are given to the same
library with those alone, and it reads the whole vocabulary when there is more to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from ..kernels.formats import pretokenizers
from ..kernels.formats.spm import TokenType
from .splitters import Keys, Splitter, check_runs

_MERGES = "tokenizer.ggml.merges"
#: Parts of words that are looked up before the whole vocabulary is read: some ten milliseconds.
_FEW_PARTS = 1 << 16
#: Merges that are looked at before that, the others with it: those of another vocabulary show in
#: any of them.
_SAMPLE = 1 << 10


def byte_level_splitter(
    keys: Keys, row: pretokenizers.PreTokenizer, ids: Mapping[str, int], types: Sequence[int]
) -> Splitter:
    """A splitter; raises InvalidFile for merges that do not join two tokens to a third."""
    vocabulary = _Vocabulary(keys, row, ids, types)
    left = _FEW_PARTS

    def split(text: str, _first: bool) -> list[int]:
        nonlocal left
        check_runs(text)
        if left > len(text):
            words = vocabulary.words(text)
            left -= sum(len(word) ** 2 for word in words)
        else:
            left = 0
        backend = vocabulary.part(words) if left > 0 else vocabulary.whole
        return backend.encode(text, add_special_tokens=False).ids

    return split


class _Vocabulary:
    """Tokens and merges of a file. Tokens that no merge makes are only reached as specials."""

    def __init__(
        self,
        keys: Keys,
        row: pretokenizers.PreTokenizer,
        ids: Mapping[str, int],
        types: Sequence[int],
    ) -> None:
        self._keys, self._ids, self._types, self._row = keys, ids, types, row
        self._merges = keys.strings(_MERGES)
        self._asked = 0
        self._normalizer, self._pre_tokenizer = pretokenizers.build(row)
        self._pairs(self._merges[:: len(self._merges) // _SAMPLE + 1])

    def words(self, text: str) -> set[str]:
        """What merges are looked for in: the pieces into which a text is cut, as symbols."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        return {word for word, _ in self._pre_tokenizer.pre_tokenize_str(text)}

    def part(self, words: set[str]) -> Any:
        """What does the same to these words as `whole`: all that is a part of one."""
        parts = {
            word[start:end]
            for word in words
            for start in range(len(word))
            for end in range(start + 1, len(word) + 1)
        }
        tokens = {part: self._ids[part] for part in parts if self._is_plain(part)}
        wanted = {
            f"{token[:cut]} {token[cut:]}" for token in tokens for cut in range(1, len(token))
        }
        return self._backend(tokens, self._pairs(self._in_order(wanted)))

    def _in_order(self, wanted: set[str]) -> list[str]:
        """Those of `wanted` that are merges, by rank; a text that comes alone needs no table."""
        self._asked += 1
        if self._asked == 1:
            return [merge for merge in self._merges if merge in wanted]
        return sorted(wanted & self._ranks.keys(), key=self._ranks.__getitem__)

    @cached_property
    def _ranks(self) -> dict[str, int]:
        return dict(zip(self._merges, range(len(self._merges)), strict=True))

    @cached_property
    def whole(self) -> Any:
        """All tokens and merges, in an object of `tokenizers`."""
        normal, ids = int(TokenType.NORMAL), self._ids
        tokens = {text: token for text, token in ids.items() if self._types[token] == normal}
        pairs = self._pairs(self._merges)
        for left, right in pairs:
            for text in (left, right, left + right):
                if text not in tokens:
                    tokens[text] = ids[text]
        return self._backend(tokens, pairs)

    def _backend(self, tokens: dict[str, int], pairs: list[tuple[str, str]]) -> Any:
        from tokenizers import Tokenizer, models

        backend = Tokenizer(models.BPE(tokens, pairs, ignore_merges=self._row.ignore_merges))
        backend.pre_tokenizer = self._pre_tokenizer
        if self._normalizer is not None:
            backend.normalizer = self._normalizer
        return backend

    def _pairs(self, merges: Iterable[str]) -> list[tuple[str, str]]:
        pairs = []
        for merge in merges:
            left, _, right = merge.partition(" ")
            if not (left in self._ids and right in self._ids and left + right in self._ids):
                raise self._keys.broken(
                    _MERGES, f"holds {merge[:80]!r}, which joins no two tokens to a third"
                )
            pairs.append((left, right))
        return pairs

    def _is_plain(self, text: str) -> bool:
        """Whether plain text can become this token: an ordinary one, or one that merges name."""
        token = self._ids.get(text)
        if token is None:
            return False
        return self._types[token] == TokenType.NORMAL or text in self._merged

    @cached_property
    def _merged(self) -> set[str]:
        pairs = self._pairs(self._merges)
        return {text for left, right in pairs for text in (left, right, left + right)}
