"""The `tokenizer.*` pairs of a GGUF from a Hugging Face checkpoint's tokenizer files.

Names and meanings are llama.cpp's. Whatever GGUF has no way to say is refused with a sentence: a
vocabulary that almost fits makes a model that almost works.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..kernels.errors import InvalidFile, UnsupportedModel, refuse_panics
from ..kernels.formats import pretokenizers, spm
from ..kernels.formats.spm import TokenType
from .config import read_bytes, read_json, read_json_if_there, read_template

# Vocabularies in forms that say too little about how text is split to be converted.
_FOREIGN = ("vocab.json", "merges.txt", "tiktoken.model", "vocab.txt", "spiece.model")
# Special tokens by their name in Hugging Face's files, and in GGUF (the misspelling is historic).
_SPECIAL = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding",
    "cls": "cls", "mask": "mask", "eot": "eot",
}  # fmt: skip
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>", re.DOTALL)
_PAD_SCORE, _ADDED_SCORE = -10000.0, -1000.0


@refuse_panics
def read_tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` pairs of a checkpoint folder, padded to `vocab_size` tokens.

    Values are str, bool, int (u32), list[str], list[int] (i32) or list[float] (f32). A folder
    without a tokenizer gives the model "none". Raises UnsupportedModel and InvalidFile.
    """
    settings = _Settings(folder)
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_file.is_file():
        document = read_json(json_file)
        if not _falls_back_to_bytes(document):
            return _from_json(json_file, document, settings, vocab_size)
        if not model_file.is_file():
            raise UnsupportedModel(
                f"{json_file} is a converted SentencePiece model; put the tokenizer.model it was "
                "made from beside it"
            )
    if model_file.is_file():
        return _from_sentencepiece(model_file, settings, vocab_size)
    for name in _FOREIGN:
        if (folder / name).is_file():
            raise UnsupportedModel(
                f"{folder / name} is a tokenizer keelback cannot convert; save a tokenizer.json "
                "with transformers (AutoTokenizer.from_pretrained, then save_pretrained)"
            )
    ids = settings.special_ids([f"[{token}]" for token in range(vocab_size)])
    ends = {f"tokenizer.ggml.{kind}_token_id": token for kind, token in ids.items()}
    return {"tokenizer.ggml.model": "none", **ends}


def _from_json(
    path: Path, document: dict[str, Any], settings: _Settings, vocab_size: int
) -> dict[str, Any]:
    """Byte-level BPE: what counts is what the `tokenizers` library does with the file."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InvalidFile(f"{path} is damaged ({error}); download it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings.complete(tokenizer)
    try:
        pre = pretokenizers.recognise(tokenizer)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from None
    if tokenizer.decoder is None or tokenizer.decoder.decode(["Ġa", "Ã©"]) != " aé":
        raise UnsupportedModel(f"{path} has a decoder other than ByteLevel, which GGUF implies")

    texts, types = _json_vocabulary(path, tokenizer, vocab_size)
    ids = settings.special_ids(texts)
    adds = _frame(path, tokenizer, ids)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": _merges(path, document, tokenizer),
        **{f"tokenizer.ggml.{kind}_token_id": token for kind, token in ids.items()},
        **adds,
        **settings.chat_templates(),
    }


def _json_vocabulary(
    path: Path, tokenizer: Tokenizer, vocab_size: int
) -> tuple[list[str], list[TokenType]]:
    texts, types = _padding(vocab_size)
    for text, token in tokenizer.get_vocab(with_added_tokens=True).items():
        _check_fits(path, text, token, vocab_size)
        if types[token] != TokenType.UNUSED:
            raise InvalidFile(f"{path} gives the id {token} to both {texts[token]!r} and {text!r}")
        texts[token], types[token] = text, TokenType.NORMAL
    for token, added in tokenizer.get_added_tokens_decoder().items():
        _check_added(path, added)
        text = added.content
        if added.normalized and tokenizer.normalizer is not None and not text.isspace():
            raise UnsupportedModel(
                f"{path}: the added token {text!r} is looked for after normalisation, which GGUF "
                'cannot say; set its "normalized" to false'
            )
        written = tokenizer.decode([token], skip_special_tokens=False)
        if written != text:
            raise UnsupportedModel(
                f"{path}: the added token {text!r} is read as such and written as {written!r}; "
                "GGUF has one text for both"
            )
        types[token] = _added_type(added)
    return texts, types


def _merges(path: Path, document: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Merges as "left right"; a space inside a piece becomes chr(ord + 256), as in llama.cpp."""
    vocabulary, merges = tokenizer.get_vocab(), []
    for merge in document["model"]["merges"]:
        pieces = merge.split(" ") if isinstance(merge, str) else merge
        left, right = (piece.replace(" ", chr(ord(" ") + 256)) for piece in pieces)
        if not vocabulary.keys() >= {left, right, left + right}:
            raise UnsupportedModel(
                f"{path}: the merge {merge!r} makes no known token once it is written as GGUF "
                "writes it; remove it, or the space in it"
            )
        merges.append(f"{left} {right}")
    return merges


def _frame(path: Path, tokenizer: Tokenizer, ids: dict[str, int]) -> dict[str, bool]:
    """Whether BOS is put in front and EOS behind, by what the tokenizer does to two texts.

    Fills `ids["bos"]` and `ids["eos"]` where no file names the token that is put there.
    """
    frames = []
    for text in ("a", "Hello, world.\n"):
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        framed = tokenizer.encode(text, add_special_tokens=True).ids
        starts = range(len(framed) - len(plain) + 1)
        start = next((i for i in starts if framed[i : i + len(plain)] == plain), len(framed))
        frames.append((framed[:start], framed[start + len(plain) :]))
    front, behind = frames[0]
    sound = frames[1] == frames[0] and len(front) <= 1 and len(behind) <= 1
    for kind, added in (("bos", front), ("eos", behind)):
        if added:
            sound = sound and ids.setdefault(kind, added[0]) == added[0]
    if not sound:
        raise UnsupportedModel(
            f"{path} puts the tokens {front} in front of a text and {behind} behind it; GGUF can "
            f"say only BOS ({ids.get('bos')}) in front and EOS ({ids.get('eos')}) behind"
        )
    return {
        "tokenizer.ggml.add_bos_token": bool(front),
        "tokenizer.ggml.add_eos_token": bool(behind),
    }


def _from_sentencepiece(path: Path, settings: _Settings, vocab_size: int) -> dict[str, Any]:
    model = spm.parse(read_bytes(path), path)
    _check_sentencepiece(path, model)
    texts, types = _padding(vocab_size)
    scores = [_PAD_SCORE] * vocab_size
    for token, piece in enumerate(model.pieces):
        _check_fits(path, piece.text, token, vocab_size)
        texts[token], types[token], scores[token] = piece.text, piece.type, piece.score
    for token, added in settings.numbered.items():
        _check_fits(settings.folder, added.content, token, vocab_size)
        _check_added(settings.folder, added)
        if types[token] == TokenType.UNKNOWN and texts[token] == added.content:
            continue
        types[token], scores[token] = _added_type(added), _ADDED_SCORE
        spaced = types[token] == TokenType.USER_DEFINED
        texts[token] = added.content.replace("▁", " ") if spaced else added.content

    if len(set(texts)) != len(texts):
        raise InvalidFile(f"{settings.folder}: an added token repeats a piece of {path.name}")
    own = {
        "bos": model.bos_id,
        "eos": model.eos_id,
        "unknown": model.unk_id,
        "padding": model.pad_id,
    }
    ids = {kind: token for kind, token in own.items() if token >= 0} | settings.special_ids(texts)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        **{f"tokenizer.ggml.{kind}_token_id": token for kind, token in ids.items()},
        "tokenizer.ggml.add_bos_token": settings.flag("add_bos_token", settings.is_llama()),
        "tokenizer.ggml.add_eos_token": settings.flag("add_eos_token", False),
        "tokenizer.ggml.add_space_prefix": settings.flag(
            "add_prefix_space", model.add_dummy_prefix
        ),
        "tokenizer.ggml.remove_extra_whitespaces": model.remove_extra_whitespaces,
        **settings.chat_templates(),
    }


def _check_sentencepiece(path: Path, model: spm.SentencePieceModel) -> None:
    """Refuse what the GGUF tokenizer `llama` does not do."""
    refused = {
        "is a unigram model, while GGUF's `llama` merges pairs": model.model_type != spm.BPE,
        "normalises text with a table of its own": bool(model.precompiled_charsmap),
        "denormalises text with a table of its own": bool(model.denormalizer_charsmap),
        "keeps spaces as they are": not model.escape_whitespaces,
        "puts spaces at the ends of pieces": model.treat_whitespace_as_suffix,
    }
    for what, applies in refused.items():
        if applies:
            raise UnsupportedModel(f"{path} {what}; such a SentencePiece model cannot be converted")


class _Settings:
    """What the small JSON files of a checkpoint say about its tokenizer.

    `numbered` holds the added tokens by id, of tokenizer_config.json or else added_tokens.json.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = read_json_if_there(folder / "tokenizer_config.json")
        self.special_map = read_json_if_there(folder / "special_tokens_map.json")
        config, self.generation = (
            read_json_if_there(folder / name) for name in ("config.json", "generation_config.json")
        )
        inner = config.get("text_config")
        self.config = {**inner, **config} if isinstance(inner, dict) else config
        stored = self.tokenizer.get("added_tokens_decoder") or {}
        added: dict[str, Any] = {}
        # The oldest form; a tokenizer.json holds the same tokens and says more about them.
        if not stored and not (folder / "tokenizer.json").is_file():
            added = read_json_if_there(folder / "added_tokens.json")
        try:
            stored = stored or {token: {"content": text} for text, token in added.items()}
            numbered = {int(token): _added_token(entry) for token, entry in stored.items()}
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

    def is_llama(self) -> bool | None:
        """True for the class whose BOS goes without saying, None where nothing can be said."""
        name = self.tokenizer.get("tokenizer_class") or "LlamaTokenizer"
        return True if name in ("LlamaTokenizer", "LlamaTokenizerFast") else None

    def complete(self, tokenizer: Tokenizer) -> None:
        """Add the tokens that tokenizer_config.json declares and tokenizer.json does not."""
        tokenizer.add_tokens(list(self.numbered.values()))
        for token, added in self.numbered.items():
            if tokenizer.token_to_id(added.content) != token:
                raise InvalidFile(
                    f"{self.folder}: tokenizer_config.json gives the id {token} to "
                    f"{added.content!r}, and tokenizer.json does not"
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
                    f"{self.folder / 'generation_config.json'} ends a generation at more tokens "
                    "than GGUF has keys for; shorten its eos_token_id"
                )
            ids[slot] = token

    def _numbers(self, source: dict[str, Any], key: str, vocab_size: int) -> list[int]:
        """The ids under a key, a number or a list; negative ones mean that there is none."""
        value = source.get(key)
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        for number in numbers:
            if type(number) is not int or number >= vocab_size:
                raise UnsupportedModel(
                    f"{self.folder}: {key} is {number!r}, and the model has {vocab_size} tokens; "
                    "correct it in config.json or generation_config.json"
                )
        return [number for number in numbers if number >= 0]

    def chat_templates(self) -> dict[str, Any]:
        """The pairs of the chat templates: a file of its own wins over tokenizer_config.json."""
        file = self.folder / "chat_template.jinja"
        stored = self.tokenizer.get("chat_template")
        try:
            if file.is_file():
                more = sorted((self.folder / "additional_chat_templates").glob("*.jinja"))
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


def _falls_back_to_bytes(document: dict[str, Any]) -> bool:
    model = document.get("model")
    return isinstance(model, dict) and bool(model.get("byte_fallback"))


def _padding(vocab_size: int) -> tuple[list[str], list[TokenType]]:
    return [f"[PAD{i}]" for i in range(vocab_size)], [TokenType.UNUSED] * vocab_size


def _check_fits(path: Path, text: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise UnsupportedModel(
            f"{path} has the token {text!r} with id {token}, and the model has {vocab_size} rows; "
            "use the tokenizer the model was trained with"
        )


def _added_token(entry: dict[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(entry["content"], **{flag: bool(entry.get(flag)) for flag in flags})


def _check_added(path: Path, added: AddedToken) -> None:
    for flag in ("lstrip", "rstrip", "single_word"):
        if getattr(added, flag):
            raise UnsupportedModel(
                f'{path}: the added token {added.content!r} sets "{flag}", which GGUF cannot say; '
                "set it to false, at the price of other ids for text around that token"
            )


def _added_type(added: AddedToken) -> TokenType:
    special = added.special or _LOOKS_SPECIAL.fullmatch(added.content)
    return TokenType.CONTROL if special else TokenType.USER_DEFINED
