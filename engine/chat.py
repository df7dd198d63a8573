"""Messages to token ids: a chat template's control tokens count, those in the messages do not.

A prompt may come from a stranger, and "<|im_end|>" in it would end the user's turn. So such texts
are put between marks before the template sees them, and are plain text afterwards. Whatever else
templates do with a message (trim it, look into it, write it as JSON) they do as ever.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..kernels.errors import InvalidFile, InvalidInput

if TYPE_CHECKING:
    from .model import Model

# Templates compare with them; somebody's vocabulary may hold one as a control token.
_ROLES = ["system", "developer", "user", "assistant", "tool", "function"]


def encode_chat(
    model: Model,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    origin: str = "the chat template",
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a prompt that asks for the answer to `messages`, by `template` or the model's own.

    BOS is there where the template writes it, as in transformers. Raises InvalidInput for a model
    without a template and messages nested too deeply, InvalidFile for a template that writes
    nothing and for a BOS or EOS that has no text, and what `render` raises.
    """
    from .template import render  # most runs are no conversation, and subprocess takes time

    tokenizer = model.tokenizer
    if template is None:
        template, origin = tokenizer.chat_template, f"tokenizer.chat_template of {model.file.path}"
    if template is None or tokenizer.kind == "none":
        lacks = "tokenizer" if tokenizer.kind == "none" else "chat template"
        raise InvalidInput(
            f"{model.file.path} holds no {lacks}, so it knows no messages; give a plain prompt"
        )
    marks = Marks(tokenizer.control_texts)
    try:
        marked = [marks.around(value) for value in (messages, tools, variables or {})]
    except RecursionError:
        raise InvalidInput(f"the messages are nested too deeply for {origin}") from None
    text = render(
        template,
        marked[0],
        origin=origin,
        tools=marked[1],
        bos_token=_spelled(model, "bos", tokenizer.bos_id),
        eos_token=_spelled(model, "eos", tokenizer.eos_id),
        variables=marked[2],
    )
    ids = tokenizer.encode_parts(marks.parts(text), add_special=False)
    if not ids:
        raise InvalidFile(f"{origin} makes an empty prompt of these messages; give another one")
    return ids


def _spelled(model: Model, name: str, token: int | None) -> str | None:
    """The text by which a template writes BOS or EOS."""
    try:
        return None if token is None else model.tokenizer.piece(token, skip_special=False).decode()
    except UnicodeDecodeError:
        raise InvalidFile(
            f"tokenizer.ggml.{name}_token_id of {model.file.path} is {token}, a part of a "
            "character, which no chat template can write; name another token with gguf set"
        ) from None


class Marks:
    """Keeps control tokens in a stranger's text apart from those that a template writes.

    Marks are random digits: no text can contain them, and they come through every filter.
    """

    def __init__(self, control_texts: Sequence[str]) -> None:
        self._texts = sorted(control_texts, key=len, reverse=True)
        number = f"{secrets.randbits(96):029d}"
        self._before, self._behind, self._edge = (f"{number}{kind}" for kind in "012")
        known = "|".join(map(re.escape, self._texts)) or "(?!)"
        self._known = re.compile(known)
        self._marked = re.compile(f"{self._before}({known})(?:{self._behind})?|{number}[012]")

    def around(self, value: Any) -> Any:
        """A copy of a JSON value with marks around every control token in its texts."""
        if isinstance(value, str):
            return self._around_text(value)
        if isinstance(value, Mapping):
            return {
                self.around(key): inner if inner in _ROLES and key == "role" else self.around(inner)
                for key, inner in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.around(inner) for inner in value]
        return value

    def parts(self, text: str) -> list[tuple[str, bool]]:
        """What a template made of marked texts, for `encode_parts`; the marks are gone."""
        parts, at = [], 0
        for match in self._marked.finditer(text):
            parts += [(text[at : match.start()], True), (match[1] or "", False)]
            at = match.end()
        return [*parts, (text[at:], True)]

    def _around_text(self, text: str) -> str:
        inner = text.strip()
        start = text.index(inner)
        marked = self._known.sub(
            lambda match: f"{self._before}{match.group()}{self._behind}", inner
        )
        # What begins or ends like a part of a control token could be joined to a whole one.
        if inner and any(_touches(known, inner) for known in self._texts):
            marked = f"{self._edge}{marked}{self._edge}"
        return text[:start] + marked + text[start + len(inner) :]


def _touches(known: str, text: str) -> bool:
    """Whether the text begins with an end of `known`, or ends with a beginning of it.

    Letters alone do not count: many a word ends with the first letter of another.
    """
    cuts = range(1, len(known))
    behind = text[0] in known and any(
        text.startswith(known[at:]) and not known[at:].isalnum() for at in cuts
    )
    return behind or (
        text[-1] in known
        and any(text.endswith(known[:at]) and not known[:at].isalnum() for at in cuts)
    )
