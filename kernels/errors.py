"""The errors a user can mend.

Every message is a sentence that names the file, the key or the tensor, and the remedy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

#: Characters of a message that are kept, at its beginning and at its end.
_BEGINNING, _END = 1200, 400


def printable(text: str) -> str:
    """A text that may quote a stranger's, with what could steer a terminal spelled out."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


class KeelbackError(Exception):
    """Something the user can mend; the command line prints it and exits with status 1."""

    def __init__(self, message: str) -> None:
        # A key or a name of a hostile file may be as long as the file.
        if len(message) > _BEGINNING + _END:
            message = f"{message[:_BEGINNING]} [...] {message[-_END:]}"
        super().__init__(printable(message))


class InvalidFile(KeelbackError):
    """A file is damaged, truncated, hostile, or not of the kind it was taken for."""


class UnsupportedModel(KeelbackError):
    """A file or checkpoint is sound, and keelback cannot run what it holds."""


class InvalidInput(KeelbackError, ValueError):
    """An argument (token ids, a state, an option) is out of its range."""


class NumericalError(KeelbackError, ArithmeticError):
    """A forward pass produced logits that are not finite."""


def refuse_panics(reader: Callable[..., Any]) -> Callable[..., Any]:
    """Make a library's panic over a file an InvalidFile that names the reader's first argument.

    Libraries in Rust panic where they were not written for a file; no `except Exception` sees it.
    """

    @functools.wraps(reader)
    def guarded(path: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return reader(path, *arguments, **named)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise InvalidFile(f"{path} is damaged ({error}); download it again") from None

    return guarded
