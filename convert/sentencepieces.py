"""SentencePiece: its own model file, and the tokenizer.json that transformers makes of one.

Such a tokenizer.json lists merges where the model had scores. Scores that fall from merge to merge
give the model back, if every pair that makes a piece is listed, and a piece's pairs side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ..kernels.errors import InvalidFile, UnsupportedModel
from ..kernels.formats import spm
from ..kernels.formats.spm import TokenType
from .config import read_bytes, read_json
from .tokenizer_settings import Settings, added_token
from .vocabulary import added_type, check_added, check_fits, check_work, padding

_PAD_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_SPACE = "▁"

_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_DECODERS = [
    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def from_sentencepiece(
    path: Path, settings: Settings, vocab_size: int, notice: Callable[[str], None]
) -> dict[str, Any]:
    """The pairs of a tokenizer.model; raises UnsupportedModel and InvalidFile."""
    model = spm.parse(read_bytes(path), path)
    _check_model(path, model)
    # With "legacy": true a space is put in front of the text behind every special token as well.
    # So it is without transformers' settings: Mistral's own code tokenizes the pieces one by one.
    legacy = settings.flag("legacy", not settings.tokenizer)
    scheme = "always" if legacy else "first"
    return _pairs(path, model, settings.numbered, scheme, settings, vocab_size, notice)


def from_metaspace(
    path: Path, settings: Settings, vocab_size: int, notice: Callable[[str], None]
) -> dict[str, Any]:
    """The pairs of a tokenizer.json made from a SentencePiece model, without the model."""
    document = read_json(path)
    model = spm.SentencePieceModel(model_type=spm.BPE, byte_fallback=True, bos_id=-1, eos_id=-1)
    prefix, scheme = _spacing(path, document)
    model.add_dummy_prefix, model.remove_extra_whitespaces = prefix, False
    added = _added(path, document, vocab_size) | settings.numbered
    _fill_pieces(path, document["model"], model, added, vocab_size)
    front, behind = _frame(document)
    settings.tokenizer.setdefault("add_bos_token", front is not None)
    settings.tokenizer.setdefault("add_eos_token", behind is not None)
    for kind, text in (("bos", front), ("eos", behind)):
        if text is not None:
            settings.tokenizer.setdefault(f"{kind}_token", text)
    return _pairs(path, model, added, scheme, settings, vocab_size, notice)


def _pairs(
    path: Path,
    model: spm.SentencePieceModel,
    added_tokens: Mapping[int, AddedToken],
    scheme: str,
    settings: Settings,
    vocab_size: int,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    texts, types = padding(vocab_size)
    scores = [_PAD_SCORE] * vocab_size
    for token, piece in enumerate(model.pieces):
        check_fits(path, piece.text, token, vocab_size)
        texts[token], types[token], scores[token] = piece.text, piece.type, piece.score
    check_added(settings.folder, added_tokens.values(), notice)
    for token, added in added_tokens.items():
        check_fits(settings.folder, added.content, token, vocab_size)
        if types[token] == TokenType.UNKNOWN and texts[token] == added.content:
            continue
        types[token], scores[token] = added_type(added), _ADDED_SCORE
        spaced = types[token] == TokenType.USER_DEFINED
        texts[token] = added.content.replace(_SPACE, " ") if spaced else added.content
    if len(set(texts)) != len(texts):
        raise InvalidFile(f"{settings.folder}: {path.name} or an added token repeats a piece")

    own = {"bos": model.bos_id, "eos": model.eos_id, "padding": model.pad_id}
    own["unknown"] = model.unk_id
    ids = {kind: token for kind, token in own.items() if 0 <= token < len(model.pieces)}
    ids |= settings.special_ids(texts)
    adds = {
        f"tokenizer.ggml.add_{kind}_token": settings.flag(f"add_{kind}_token", default)
        and kind in ids
        for kind, default in (("bos", settings.is_llama()), ("eos", False))
    }
    prefix = settings.flag("add_prefix_space", model.add_dummy_prefix)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        **{f"tokenizer.ggml.{kind}_token_id": token for kind, token in ids.items()},
        **adds,
        "tokenizer.ggml.add_space_prefix": prefix,
        # llama.cpp knows one way to put the space there, and steps over this key.
        **({"tokenizer.ggml.prepend_scheme": scheme} if prefix and scheme != "always" else {}),
        "tokenizer.ggml.remove_extra_whitespaces": model.remove_extra_whitespaces,
        **settings.chat_templates(),
    }


def _check_model(path: Path, model: spm.SentencePieceModel) -> None:
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


def _spacing(path: Path, document: dict[str, Any]) -> tuple[bool, str]:
    """Whether a space is put in front of a text, and when: the values of `prepend_scheme`."""
    refused = UnsupportedModel(
        f"{path} is a converted SentencePiece model of no known kind; put the tokenizer.model it "
        "was made from beside it"
    )
    normalizers = _parts(document.get("normalizer"), "normalizers")
    pre_tokenizer = document.get("pre_tokenizer")
    if normalizers in ([_PREPEND, _TO_SPACE], [_TO_SPACE]) and pre_tokenizer is None:
        prefix, scheme = len(normalizers) == 2, "always"
    elif normalizers == [] and isinstance(pre_tokenizer, dict):
        found = pre_tokenizer.get("prepend_scheme")
        metaspace = {"type": "Metaspace", "replacement": _SPACE, "split": False}
        known = {key: pre_tokenizer.get(key) for key in metaspace} == metaspace
        if not known or found not in ("first", "always", "never"):
            raise refused
        prefix, scheme = found != "never", f"metaspace-{found}"
    else:
        raise refused
    decoders = _parts(document.get("decoder"), "decoders")
    if decoders != ([*_DECODERS, _STRIP] if prefix else _DECODERS):
        raise refused
    return prefix, scheme


def _parts(node: Any, name: str) -> list[Any]:
    """The steps of a sequence, or the only step."""
    if isinstance(node, dict) and node.get("type") == "Sequence":
        parts = node.get(name)
        return parts if isinstance(parts, list) else [None]
    return [] if node is None else [node]


def _added(path: Path, document: dict[str, Any], vocab_size: int) -> dict[int, AddedToken]:
    entries = document.get("added_tokens") or []
    found = {}
    try:
        for entry in entries:
            check_fits(path, entry["content"], entry["id"], vocab_size)
            found[entry["id"]] = added_token(entry)
    except (AttributeError, KeyError, TypeError):
        raise InvalidFile(f"{path}: the list of added tokens is damaged") from None
    return found


def _fill_pieces(
    path: Path,
    stored: dict[str, Any],
    model: spm.SentencePieceModel,
    added: Mapping[int, AddedToken],
    vocab_size: int,
) -> None:
    """The pieces of a tokenizer.json's model, with scores in the order of its merges."""
    vocabulary, unknown = stored.get("vocab"), stored.get("unk_token")
    if (
        not isinstance(unknown, str)
        or not isinstance(vocabulary, dict)
        or unknown not in vocabulary
    ):
        raise InvalidFile(f"{path} has no vocabulary, or no unknown token; download it again")
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if not stored.get("fuse_unk") or any(stored.get(option) for option in options):
        raise UnsupportedModel(
            f"{path} has options no SentencePiece model has; put the tokenizer.model it was made "
            "from beside it"
        )
    by_id: dict[int, str] = {}
    for text, token in vocabulary.items():
        check_fits(path, text, token, vocab_size)
        by_id[token] = text
    if len(by_id) != len(vocabulary) or max(by_id) != len(by_id) - 1:
        raise InvalidFile(f"{path} leaves out an id or gives it twice; download it again")
    check_work(path, vocabulary)
    special = {unknown, *_BYTES, *(entry.content for entry in added.values())}
    scores = _scores(path, vocabulary, stored.get("merges"), special)
    for token in range(len(by_id)):
        text = by_id[token]
        kind = TokenType.BYTE if text in _BYTES else TokenType.NORMAL
        kind = TokenType.UNKNOWN if text == unknown else kind
        model.pieces.append(spm.Piece(text, scores.get(text, -float(len(scores))), kind))
    model.unk_id = vocabulary[unknown]


def _scores(
    path: Path, vocabulary: Mapping[str, int], merges: Any, special: set[str]
) -> dict[str, float]:
    """Minus the place of every piece that merges make, in the order of the merges."""
    makes: dict[str, set[str]] = {}
    last, sound = None, isinstance(merges, list)
    for merge in merges if sound else []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        sound = sound and isinstance(pair, list) and len(pair) == 2
        sound = sound and all(isinstance(piece, str) and piece in vocabulary for piece in pair)
        if not sound:
            break
        piece = pair[0] + pair[1]
        sound = piece in vocabulary and (piece == last or piece not in makes or piece in special)
        makes.setdefault(piece, set()).add(pair[0])
        last = piece
    for text in vocabulary:
        cuts = {text[:at] for at in range(1, len(text)) if text[:at] in vocabulary}
        cuts = {left for left in cuts if text[len(left) :] in vocabulary}
        sound = sound and (text in special or makes.get(text, set()) == cuts)
    if not sound:
        raise UnsupportedModel(
            f"{path} has merges that no SentencePiece model leads to; put the tokenizer.model it "
            "was made from beside it"
        )
    return {piece: -float(place) for place, piece in enumerate(makes)}


def _frame(document: dict[str, Any]) -> tuple[str | None, str | None]:
    """The special tokens that the post-processor puts in front of a text and behind it."""
    for processor in _parts(document.get("post_processor"), "processors"):
        single = processor.get("single") if isinstance(processor, dict) else None
        parts = single if isinstance(single, list) else []
        texts = [_special(part) for part in parts]
        if texts.count(None) == 1:  # the text itself
            place = texts.index(None)
            return ([None, *texts[:place]])[-1], ([*texts[place + 1 :], None])[0]
    return None, None


def _special(part: Any) -> str | None:
    entry = part.get("SpecialToken") if isinstance(part, dict) else None
    text = entry.get("id") if isinstance(entry, dict) else None
    return text if isinstance(text, str) else None
