"""Vocabularies that are lists of byte strings in order of rank: tiktoken files, and tekken.json.

tiktoken merges whatever two neighbours make the token of lowest rank, and asks first whether a
whole word is a token. GGUF wants the merges: of every token the last one that leads to it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models

from ..kernels.errors import InvalidFile, UnsupportedModel
from ..kernels.formats import pretokenizers
from ..kernels.formats.pretokenizers import Recognised
from .byte_level import pairs
from .config import read_bytes, read_json
from .tokenizer_settings import Settings
from .vocabulary import LONGEST_TOKEN, check_fits, check_work

#: Files of tiktoken, and the pre-tokenizer that goes with each. The pattern itself stands in a
#: program beside the file, which is not run; it must hold the text behind the name.
PATTERNS = {"tiktoken.model": "kimi-k2", "qwen.tiktoken": "qwen2", "qwen3_6.tiktoken": "qwen35"}
_PROGRAMS = "tokenization_*.py"
#: The files that are read here.
FILES = ("tekken.json", *PATTERNS, _PROGRAMS)
_SIGNS = {
    "kimi-k2": r"[\p{Han}]+", "qwen2": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    "qwen35": r"[\p{L}\p{M}]+|\p{N}|",
}  # fmt: skip
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_EXTRAS, _KIMI_RESERVED = 205, 258

# The first special tokens of a tekken.json that lists none.
_TEKKEN_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)  # fmt: skip


def from_tiktoken(
    path: Path, settings: Settings, vocab_size: int, notice: Callable[[str], None]
) -> dict[str, Any]:
    """The pairs of a tiktoken file: a token in base64 and its rank on every line.

    Raises InvalidFile for a damaged file, UnsupportedModel where the program beside it splits text
    in another way than is known.
    """
    ranks: dict[bytes, int] = {}
    try:
        for line in read_bytes(path).splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank[:12])
    except (ValueError, binascii.Error) as error:
        raise InvalidFile(f"{path} is damaged ({error}); download it again") from None
    pre = PATTERNS[path.name]
    _check_sign(path, pre)
    special = dict(settings.numbered)
    start = len(ranks)
    if pre == "kimi-k2":
        for place in range(start, min(start + _KIMI_RESERVED, vocab_size)):
            special.setdefault(place, _control(f"<|reserved_token_{place}|>"))
    elif not special:
        texts = (*_QWEN_SPECIAL, *(f"<|extra_{i}|>" for i in range(_QWEN_EXTRAS)))
        special = {start + place: _control(text) for place, text in enumerate(texts)}
    settings.tokenizer.setdefault("add_bos_token", False)
    return _pairs(path, ranks, special, pre, settings, vocab_size, notice)


def from_tekken(
    path: Path, settings: Settings, vocab_size: int, notice: Callable[[str], None]
) -> dict[str, Any]:
    """The pairs of Mistral's tekken.json: special tokens first, then the ranks.

    Raises InvalidFile for a damaged file, UnsupportedModel for another pattern than the one known
    and for more tokens than the model has rows.
    """
    document = read_json(path)
    try:
        config = document["config"]
        count, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        listed = document.get("special_tokens")
        if listed is None:
            listed = [{"token_str": text} for text in _TEKKEN_SPECIAL]
        texts = [str(entry["token_str"]) for entry in listed]
        controls = [bool(entry.get("is_control", True)) for entry in listed]
        if any(entry.get("rank", place) != place for place, entry in enumerate(listed)):
            raise ValueError("its special tokens are out of order")
        if not len(texts) <= count <= size <= vocab_size:
            raise UnsupportedModel(
                f"{path} has {size} tokens, {count} of them special, and the model {vocab_size} "
                "rows; use the tokenizer the model was trained with"
            )
        ranks = {
            base64.b64decode(entry["token_bytes"], validate=True): count + entry["rank"]
            for entry in document["vocab"][: size - count]
        }
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InvalidFile(f"{path} is damaged ({error!r}); download it again") from None
    row = pretokenizers.TABLE["tekken"]
    if config.get("pattern") != row.patterns[0]:
        raise UnsupportedModel(f"{path} splits text by a pattern keelback does not know")
    texts += [f"<SPECIAL_{token}>" for token in range(len(texts), count)]
    controls += [True] * (count - len(controls))
    special = {
        token: AddedToken(text, normalized=False, special=control)
        for token, (text, control) in enumerate(zip(texts, controls, strict=True))
    }
    for kind, text in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"), ("pad", "<pad>")):
        settings.tokenizer.setdefault(f"{kind}_token", text)
    settings.tokenizer.setdefault("add_bos_token", True)
    return _pairs(path, ranks, special, "tekken", settings, vocab_size, notice)


def last_merges(ranks: Mapping[bytes, int]) -> dict[bytes, tuple[bytes, bytes]]:
    """The two parts of every token that merging can lead to, in order of rank.

    Merging inside a token's bytes is the same wherever they stand: so the parts are those that the
    bytes alone come down to, and no other two ever make that token.
    """
    tokens = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    found = {token: _merge(ranks, token) for token in tokens}
    return {token: parts for token, parts in found.items() if parts is not None}


def _merge(ranks: Mapping[bytes, int], token: bytes) -> tuple[bytes, bytes] | None:
    parts = [token[at : at + 1] for at in range(len(token))]
    joined = [ranks.get(left + right) for left, right in pairwise(parts)]
    while len(parts) > 2:
        known = [rank for rank in joined if rank is not None]
        if not known:
            return None
        at = joined.index(min(known))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del joined[at]
        for place in (at - 1, at):
            if 0 <= place < len(joined):
                joined[place] = ranks.get(parts[place] + parts[place + 1])
    return parts[0], parts[1]


def _pairs(
    path: Path,
    ranks: dict[bytes, int],
    special: Mapping[int, AddedToken],
    pre: str,
    settings: Settings,
    vocab_size: int,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """The pairs of ranks that are ids, and of special tokens beside them."""
    _check_ranks(path, ranks, vocab_size)
    merges = last_merges(ranks)
    spelled = {token: _spell(token) for token in ranks}
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    taken = set(ranks.values())
    for token, added in special.items():
        check_fits(path, added.content, token, vocab_size)
        if vocabulary.setdefault(added.content, token) != token or token in taken:
            raise InvalidFile(f"{path}: the special token {added.content!r} has an id of another")
    row = pretokenizers.TABLE[pre]
    # Some tokens no merge leads to; they are found where they are a whole word.
    alone = any(len(token) > 1 and token not in merges for token in ranks)
    recognised = Recognised(pre, row.normalizer, row.ignore_merges or alone)
    listed = [(spelled[left], spelled[right]) for left, right in merges.values()]
    tokenizer = Tokenizer(models.BPE(vocabulary, listed, ignore_merges=True))
    normalizer, tokenizer.pre_tokenizer = pretokenizers.build(row)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([special[token] for token in sorted(special)])
    settings.complete(tokenizer)
    return pairs(path, tokenizer, listed, recognised, settings, vocab_size, notice)


def _check_ranks(path: Path, ranks: Mapping[bytes, int], vocab_size: int) -> None:
    sound = all(bytes([byte]) in ranks for byte in range(256)) and b"" not in ranks
    sound = sound and len(set(ranks.values())) == len(ranks)
    sound = sound and all(type(rank) is int for rank in ranks.values())
    sound = sound and max(map(len, ranks)) <= LONGEST_TOKEN
    if not sound:
        raise InvalidFile(f"{path} is no list of byte strings and their ranks; download it again")
    check_work(path, ranks)
    for token, rank in ranks.items():
        check_fits(path, repr(token), rank, vocab_size)


def _check_sign(path: Path, pre: str) -> None:
    """Refuse a file whose program, where there is one, has another pattern than the name says."""
    programs = sorted(path.parent.glob(_PROGRAMS))
    texts = [read_bytes(program).decode("utf-8", "replace") for program in programs]
    if texts and not any(_SIGNS[pre] in text for text in texts):
        raise UnsupportedModel(
            f"{programs[0]} splits text otherwise than {path.name} is known to; save a "
            "tokenizer.json with transformers"
        )


def _control(text: str) -> AddedToken:
    return AddedToken(text, normalized=False, special=True)


def _spell(token: bytes) -> str:
    """The bytes in GPT-2's alphabet."""
    return "".join(map(pretokenizers.SYMBOLS.__getitem__, token))
