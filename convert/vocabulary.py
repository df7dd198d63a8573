"""What the readers of tokenizer files share: padding, sizes, and the types of added tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ..kernels.errors import InvalidFile, UnsupportedModel
from ..kernels.formats.spm import TokenType

# Several times the longest token of any vocabulary; the engine refuses more as well.
LONGEST_TOKEN = 1 << 13
# Finding the merges takes the square of a token's length; real vocabularies need a tenth of this.
_MOST_WORK = 1 << 27

_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>", re.DOTALL)
_STRIPS = ("lstrip", "rstrip", "single_word")


def padding(vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Texts and types of a vocabulary in which no token is known yet."""
    return [f"[PAD{i}]" for i in range(vocab_size)], [TokenType.UNUSED] * vocab_size


def check_fits(path: Path, text: Any, token: Any, vocab_size: int) -> None:
    """Refuse a token that the model has no row for, or that is no token at all."""
    sound = type(token) is int and isinstance(text, str) and bool(text)
    if not sound or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidFile(
            f"{path} gives {repr(text)[:80]} the id {repr(token)[:80]}; download it again"
        )
    if not 0 <= token < vocab_size:
        raise UnsupportedModel(
            f"{path} has the token {text[:80]!r} with id {token}, and the model has {vocab_size} "
            "rows; use the tokenizer the model was trained with"
        )
    if len(text) > LONGEST_TOKEN:
        raise InvalidFile(f"{path}: the token {token} has {len(text)} characters; do not trust it")


def check_work(path: Path, tokens: Iterable[Sized]) -> None:
    """Refuse a vocabulary whose merges would take hours to find."""
    if sum(len(token) ** 2 for token in tokens) > _MOST_WORK:
        raise InvalidFile(f"{path} has more long tokens than any vocabulary; do not trust it")


def check_added(path: Path, tokens: Iterable[AddedToken], notice: Callable[[str], None]) -> None:
    """Refuse added tokens that swallow the spaces of ordinary text, which GGUF cannot say.

    Of a special token only what stands beside it in a text is concerned, and text rarely holds
    one; llama.cpp steps over these flags too. So `notice` is told, and the model is converted.
    """
    concerned = []
    for added in tokens:
        flags = [flag for flag in _STRIPS if getattr(added, flag)]
        if flags and added_type(added) != TokenType.CONTROL:
            raise UnsupportedModel(
                f'{path}: the added token {added.content!r} sets "{flags[0]}", which GGUF cannot '
                "say; set it to false, at the price of other ids for text around that token"
            )
        if flags:
            concerned.append(added.content)
    if concerned:
        notice(
            f"{path.name} strips the spaces around {', '.join(concerned[:5])}"
            f"{' and others' if len(concerned) > 5 else ''}, or finds it as a word alone; here "
            "it is found as it stands, and spaces are kept"
        )


def added_type(added: AddedToken) -> TokenType:
    """A control token has no text in an answer, a user-defined one has."""
    special = added.special or _LOOKS_SPECIAL.fullmatch(added.content)
    return TokenType.CONTROL if special else TokenType.USER_DEFINED
