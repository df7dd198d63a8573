"""What the small JSON files of a checkpoint say about its tokenizer.

Names and meanings are those of transformers: tokenizer_config.json, special_tokens_map.json,
added_tokens.json, config.json, generation_config.json and the chat templates.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..kernels.errors import InvalidFile, UnsupportedModel
from ..kernels.formats import pretokenizers
from .config import read_json_if_there, read_template
from .layouts import unwrapped

#: Templates beside the default one.
_MORE_TEMPLATES = "additional_chat_templates/*.jinja"
#: The files that are read here.
FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json",
    "generation_config.json", "chat_template.jinja", "chat_template.json", _MORE_TEMPLATES,
)  # fmt: skip

# Special tokens by their name in Hugging Face's files, and in GGUF (the misspelling is historic).
_SPECIAL = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding",
    "cls": "cls", "mask": "mask", "eot": "eot",
}  # fmt: skip


class Settings:
    """What the small JSON files of a checkpoint say about its tokenizer.

    `numbered` holds the added tokens by id, of tokenizer_config.json or else added_tokens.json.
    The configs are those of the checkpoint's own folder, wherever its tokenizer comes from.
    """

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.tokenizer = read_json_if_there(folder / "tokenizer_config.json")
        self.special_map = read_json_if_there(folder / "special_tokens_map.json")
        config, self.generation = (
            read_json_if_there(checkpoint / name)
            for name in ("config.json", "generation_config.json")
        )
        self.config = unwrapped(config)
        stored = self.tokenizer.get("added_tokens_decoder") or {}
        added: dict[str, Any] = {}
        # The oldest form; a tokenizer.json holds the same tokens and says more about them.
        if not stored and not (folder / "tokenizer.json").is_file():
            added = read_json_if_there(folder / "added_tokens.json")
        try:
            stored = stored or {token: {"content": text} for text, token in added.items()}
            numbered = {int(token): added_token(entry) for token, entry in stored.items()}
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            raise InvalidFile(f"{folder}: the list of added tokens is damaged") from None
        self.numbered = dict(sorted(numbered.items()))

    def flag(self, key: str, default: bool | None) -> bool:
        """A boolean of tokenizer_config.json; UnsupportedModel where it is needed and not given."""
        value = self.tokenizer.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UnsupportedModel(
                f'{self.folder / "tokenizer_config.json"} lacks "{key}"; set it to true or false'
            )
        return value

    @property
    def tokenizer_class(self) -> str:
        """The name of the tokenizer's class, the same for its fast and its slow form."""
        return str(self.tokenizer.get("tokenizer_class") or "").removesuffix("Fast")

    def is_llama(self) -> bool | None:
        """True for the class whose BOS goes without saying, None where nothing can be said."""
        return True if self.tokenizer_class in ("", "LlamaTokenizer") else None

    def complete(self, tokenizer: Tokenizer) -> None:
        """Add the tokens that tokenizer_config.json declares and tokenizer.json does not.

        Raises InvalidFile where they have other ids in the vocabulary.
        """
        tokenizer.add_tokens(list(self.numbered.values()))
        for token, added in self.numbered.items():
            if tokenizer.token_to_id(added.content) != token:
                raise InvalidFile(
                    f"{self.folder}: tokenizer_config.json or added_tokens.json gives the id "
                    f"{token} to {added.content[:80]!r}, and the vocabulary does not; download the "
                    "tokenizer again"
                )
        present = {added.content for added in tokenizer.get_added_tokens_decoder().values()}
        named = (self.name(kind) for kind in _SPECIAL)
        vocabulary = tokenizer.get_vocab()
        missing = [text for text in named if text in vocabulary and text not in present]
        tokenizer.add_special_tokens(missing)

    def name(self, kind: str) -> str | None:
        """The text of a special token, where a file names one."""
        for source in (self.tokenizer, self.special_map):
            entry = source.get(f"{kind}_token")
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                return text
        return None

    def special_ids(self, texts: list[str]) -> dict[str, int]:
        """Ids of special tokens by GGUF's names: named tokens first, numbers in configs second."""
        known = {text: token for token, text in enumerate(texts)}
        ids = {}
        for kind, gguf_name in _SPECIAL.items():
            numbers = [
                *self._numbers(self.config, f"{kind}_token_id", len(texts)),
                *self._numbers(self.generation, f"{kind}_token_id", len(texts)),
            ]
            name = self.name(kind)
            if name in known:
                ids[gguf_name] = known[name]
            elif numbers:
                ids[gguf_name] = numbers[0]
        self._place_ends(ids, texts)
        return ids

    def _place_ends(self, ids: dict[str, int], texts: list[str]) -> None:
        """Give further ends of a generation the keys GGUF has left, unless their texts say it."""
        for token in self._numbers(self.generation, "eos_token_id", len(texts)):
            if token in ids.values() or texts[token] in pretokenizers.END_TEXTS:
                continue
            slot = next((slot for slot in ("eos", "eot", "eom") if slot not in ids), None)
            if slot is None:
                raise UnsupportedModel(
                    f"{self.checkpoint / 'generation_config.json'} ends a generation at more "
                    "tokens than GGUF has keys for; shorten its eos_token_id"
                )
            ids[slot] = token

    def _numbers(self, source: dict[str, Any], key: str, vocab_size: int) -> list[int]:
        """The ids under a key, a number or a list; negative ones mean that there is none."""
        value = source.get(key)
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        for number in numbers:
            if type(number) is not int or number >= vocab_size:
                raise UnsupportedModel(
                    f"{self.checkpoint}: {key} is {number!r}, and the model has {vocab_size} "
                    "tokens; correct it in config.json or generation_config.json"
                )
        return [number for number in numbers if number >= 0]

    def chat_templates(self) -> dict[str, Any]:
        """The pairs of the chat templates: chat_template.jinja wins over tokenizer_config.json.

        Raises InvalidFile for templates that are no texts, or are links out of the checkpoint.
        """
        file = self.folder / "chat_template.jinja"
        stored = self.tokenizer.get("chat_template")
        if stored is None:
            # Where processors of several kinds of input have kept it.
            stored = read_json_if_there(self.folder / "chat_template.json").get("chat_template")
        try:
            if file.is_file():
                more = sorted(self.folder.glob(_MORE_TEMPLATES))
                named = {"default": read_template(self.folder, file)}
                named |= {path.stem: read_template(self.folder, path) for path in more}
            elif isinstance(stored, list):
                named = {str(entry["name"]): str(entry["template"]) for entry in stored}
            else:
                named = {} if stored is None else {"default": str(stored)}
        except (KeyError, TypeError, UnicodeDecodeError):
            raise InvalidFile(f"{self.folder}: the chat template is damaged") from None
        if any("\ud800" <= letter <= "\udfff" for text in named.values() for letter in text):
            raise InvalidFile(f"{self.folder}: the chat template holds half a surrogate pair")
        named = {re.sub(r"\W", "", name, flags=re.ASCII): text for name, text in named.items()}
        default = named.pop("default", None)
        pairs: dict[str, Any] = {} if default is None else {"tokenizer.chat_template": default}
        if named:
            pairs["tokenizer.chat_templates"] = list(named)
        return pairs | {f"tokenizer.chat_template.{name}": text for name, text in named.items()}


def added_token(entry: dict[str, Any]) -> AddedToken:
    """An added token as the JSON files describe it."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(entry["content"], **{flag: bool(entry.get(flag)) for flag in flags})
