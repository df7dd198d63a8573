"""Byte-level BPE: tokenizer.json, and the older vocab.json with merges.txt.

What counts is what the `tokenizers` library does with a file; which pre-tokenizer it has is found
by trying it on texts. Patterns of strangers are looked at before they are run.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models

from ..kernels.errors import InvalidFile, KeelbackError, UnsupportedModel
from ..kernels.formats import pretokenizers
from ..kernels.formats.pretokenizers import Recognised
from ..kernels.formats.spm import TokenType
from .config import read_bytes, read_json
from .regexes import patterns_of, why_not
from .tokenizer_settings import Settings
from .vocabulary import added_type, check_added, check_fits, padding

# The classes whose vocabularies have a vocab.json and a merges.txt, and how they split text.
_CLASSES = {
    "GPT2Tokenizer": "gpt-2", "CodeGenTokenizer": "gpt-2", "GPTNeoXTokenizer": "olmo",
    "Qwen2Tokenizer": "qwen2", "Qwen3_5Tokenizer": "qwen35",
}  # fmt: skip
_END = "<|endoftext|>"


def from_json(
    path: Path, settings: Settings, vocab_size: int, notice: Callable[[str], None]
) -> dict[str, Any]:
    """The pairs of a tokenizer.json; raises UnsupportedModel and InvalidFile."""
    document = read_json(path)
    try:
        merges = _check_document(path, document, vocab_size)
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings.complete(tokenizer)
        recognised = _recognise(path, tokenizer)
        return pairs(path, tokenizer, merges, recognised, settings, vocab_size, notice)
    except KeelbackError:
        raise
    except BaseException as error:
        # The library raises nothing narrower than Exception, and a panic where it gives up.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidFile(f"{path} is damaged ({str(error)[:200]}); download it again") from None


def _recognise(path: Path, tokenizer: Tokenizer) -> Recognised:
    if tokenizer.decoder is None or tokenizer.decoder.decode(["Ġa", "Ã©"]) != " aé":
        raise UnsupportedModel(f"{path} has a decoder other than ByteLevel, which GGUF implies")
    try:
        return pretokenizers.recognise(tokenizer)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from None


def from_vocab_and_merges(
    path: Path, settings: Settings, vocab_size: int, notice: Callable[[str], None]
) -> dict[str, Any]:
    """The pairs of a vocab.json and its merges.txt; the class says how text is split.

    Raises UnsupportedModel for a class that is not known to say it, InvalidFile for damaged files.
    """
    name = settings.tokenizer_class
    if name not in _CLASSES or settings.tokenizer.get("add_prefix_space"):
        raise UnsupportedModel(
            f"{path} says too little about how a {name or 'tokenizer of no class'} splits text; "
            "save a tokenizer.json with transformers (AutoTokenizer.from_pretrained, then "
            "save_pretrained)"
        )
    vocabulary = read_json(path)
    _check_vocabulary(path, vocabulary, vocab_size)
    merges_path = path.parent / "merges.txt"
    try:
        lines = read_bytes(merges_path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidFile(f"{merges_path} is damaged ({error}); download it again") from None
    skipped = 1 if lines[0].startswith("#version") else 0
    merges = [line.removesuffix("\r").split(" ") for line in lines[skipped:] if line.strip()]
    _check_merges(merges_path, merges, vocabulary)
    row = pretokenizers.TABLE[_CLASSES[name]]
    tokenizer = Tokenizer(models.BPE(vocabulary, [(left, right) for left, right in merges]))
    normalizer, tokenizer.pre_tokenizer = pretokenizers.build(row)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    if _END in vocabulary:  # what these classes take for an end where no file names one
        tokenizer.add_special_tokens([_END])
        settings.tokenizer.setdefault("eos_token", _END)
    settings.complete(tokenizer)
    recognised = Recognised(_CLASSES[name], row.normalizer, row.ignore_merges)
    return pairs(path, tokenizer, merges, recognised, settings, vocab_size, notice)


def pairs(
    path: Path,
    tokenizer: Tokenizer,
    merges: Sequence[Sequence[str]],
    recognised: Recognised,
    settings: Settings,
    vocab_size: int,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """The pairs of a tokenizer object whose merges and pre-tokenizer are known."""
    texts, types = _vocabulary(path, tokenizer, vocab_size, notice)
    ids = settings.special_ids(texts)
    adds = _frame(path, tokenizer, settings, ids)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": recognised.name,
        **_beyond_the_name(path, recognised, notice),
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": _spelled(path, merges, tokenizer),
        **{f"tokenizer.ggml.{kind}_token_id": token for kind, token in ids.items()},
        **adds,
        **settings.chat_templates(),
    }


def _check_document(
    path: Path, document: dict[str, Any], vocab_size: int
) -> Sequence[Sequence[str]]:
    """The merges of a tokenizer.json, after what must not reach the library has been refused."""
    model = document.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise UnsupportedModel(
            f"{path} holds a {repr(kind)[:40]} tokenizer; keelback converts byte-level BPE"
        )
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedModel(
                f"{path} sets {option} = {repr(model[option])[:40]}, which GGUF has no key for"
            )
    try:
        pretokenizers.check_normalizer(document.get("normalizer"))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from None
    parts = [document.get(name) for name in ("pre_tokenizer", "decoder")]
    for pattern in patterns_of(parts):
        if reason := why_not(pattern):
            raise UnsupportedModel(
                f"{path}: the regular expression {pattern[:80]!r} {reason}, as no known "
                "pre-tokenizer does; it is not run"
            )
    if not _is_complete(document.get("post_processor")):
        raise InvalidFile(f"{path}: the post-processor names tokens it does not have")
    _check_vocabulary(path, model.get("vocab"), vocab_size)
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise InvalidFile(f"{path} has no list of merges; download it again")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    _check_merges(path, merges, model["vocab"])
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise InvalidFile(f"{path}: the list of added tokens is damaged; download it again")
    for entry in added:
        check_fits(path, entry.get("content"), entry.get("id"), vocab_size)
    return merges


def _is_complete(node: Any) -> bool:
    """Whether templates have an entry for each of their tokens; the library does not ask."""
    if not isinstance(node, dict):
        return True
    if isinstance(node.get("processors"), list):
        return all(map(_is_complete, node["processors"]))
    parts = [part for key in ("single", "pair") for part in _listed(node.get(key))]
    used = [part.get("SpecialToken") for part in parts if isinstance(part, dict)]
    known = node.get("special_tokens")
    names = set(known) if isinstance(known, dict) else set()
    return all(isinstance(token, dict) and str(token.get("id")) in names for token in used if token)


def _listed(node: Any) -> list[Any]:
    return node if isinstance(node, list) else []


def _check_vocabulary(path: Path, vocabulary: Any, vocab_size: int) -> None:
    if not isinstance(vocabulary, dict):
        raise InvalidFile(f"{path} has no vocabulary; download it again")
    for text, token in vocabulary.items():
        check_fits(path, text, token, vocab_size)


def _check_merges(path: Path, merges: list[Any], vocabulary: dict[str, int]) -> None:
    for merge in merges:
        sound = isinstance(merge, list) and len(merge) == 2
        sound = sound and all(isinstance(piece, str) and piece in vocabulary for piece in merge)
        if not sound or merge[0] + merge[1] not in vocabulary:
            raise InvalidFile(
                f"{path}: the merge {repr(merge)[:80]} does not join two tokens to a third; "
                "download it again"
            )


def _vocabulary(
    path: Path, tokenizer: Tokenizer, vocab_size: int, notice: Callable[[str], None]
) -> tuple[list[str], list[TokenType]]:
    texts, types = padding(vocab_size)
    for text, token in tokenizer.get_vocab(with_added_tokens=True).items():
        check_fits(path, text, token, vocab_size)
        if types[token] != TokenType.UNUSED:
            raise InvalidFile(f"{path} gives the id {token} to both {texts[token]!r} and {text!r}")
        texts[token], types[token] = text, TokenType.NORMAL
    added = tokenizer.get_added_tokens_decoder()
    check_added(path, added.values(), notice)
    for token, entry in added.items():
        text = entry.content
        if entry.normalized and tokenizer.normalizer is not None:
            _check_normalized(path, text)
        written = tokenizer.decode([token], skip_special_tokens=False)
        if written != text:
            raise UnsupportedModel(
                f"{path}: the added token {text!r} is read as such and written as {written!r}; "
                "GGUF has one text for both"
            )
        types[token] = added_type(entry)
    return texts, types


def _check_normalized(path: Path, text: str) -> None:
    """Here added tokens are looked for first. NFC leaves most texts alone, whatever is beside."""
    sound = unicodedata.is_normalized("NFC", text) and not unicodedata.combining(text[0])
    if not sound:
        raise UnsupportedModel(
            f"{path}: the added token {text!r} is looked for after normalisation, which GGUF "
            'cannot say; set its "normalized" to false'
        )


def _spelled(path: Path, merges: Sequence[Sequence[str]], tokenizer: Tokenizer) -> list[str]:
    """Merges as "left right"; a space inside a piece becomes chr(ord + 256), as in llama.cpp."""
    vocabulary, spelled = tokenizer.get_vocab(), []
    for merge in merges:
        left, right = (piece.replace(" ", chr(ord(" ") + 256)) for piece in merge)
        if not vocabulary.keys() >= {left, right, left + right}:
            raise UnsupportedModel(
                f"{path}: the merge {merge!r} makes no known token once it is written as GGUF "
                "writes it; remove it, or the space in it"
            )
        spelled.append(f"{left} {right}")
    return spelled


def _beyond_the_name(
    path: Path, recognised: Recognised, notice: Callable[[str], None]
) -> dict[str, Any]:
    """Keys that only keelback reads, for a combination that no name stands for."""
    row = pretokenizers.TABLE[recognised.name]
    found: dict[str, Any] = {}
    if recognised.normalizer != row.normalizer:
        found["tokenizer.ggml.normalizer"] = recognised.normalizer or "none"
    if recognised.ignore_merges != row.ignore_merges:
        found["tokenizer.ggml.ignore_merges"] = recognised.ignore_merges
    if "tokenizer.ggml.ignore_merges" in found:
        notice(
            f"for keelback only: {path.name} splits text as {recognised.name}, but has "
            f"ignore_merges = {recognised.ignore_merges}; llama.cpp finds other ids for a few words"
        )
    return found


def _frame(
    path: Path, tokenizer: Tokenizer, settings: Settings, ids: dict[str, int]
) -> dict[str, bool]:
    """Whether BOS is put in front and EOS behind: as tokenizer_config.json has it, or by trial.

    Fills `ids["bos"]` and `ids["eos"]` where no file names the token that is put there.
    """
    flags = [settings.tokenizer.get(f"add_{kind}_token") for kind in ("bos", "eos")]
    if any(isinstance(flag, bool) for flag in flags):
        front, behind = (bool(flag) for flag in flags)
        front, behind = front and "bos" in ids, behind and "eos" in ids
    else:
        front, behind = _framed(path, tokenizer, ids)
    return {"tokenizer.ggml.add_bos_token": front, "tokenizer.ggml.add_eos_token": behind}


def _framed(path: Path, tokenizer: Tokenizer, ids: dict[str, int]) -> tuple[bool, bool]:
    """What the tokenizer does to two texts, where GGUF can say it."""
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
    return bool(front), bool(behind)
