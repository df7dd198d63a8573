"""SentencePiece's model file: a protobuf message, read and written without the protobuf package.

Source: sentencepiece_model.proto. Only what decides how text is split is kept; fields that say how
a model was trained are stepped over. Nothing in a file is trusted.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

from ..errors import InvalidFile

UNIGRAM, BPE = 1, 2


class TokenType(IntEnum):
    """The type of a piece; GGUF's `tokenizer.ggml.token_type` uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the list."""

    text: str
    score: float = 0.0
    type: TokenType = TokenType.NORMAL


@dataclass(slots=True)
class SentencePieceModel:
    """A ModelProto: pieces by id, and the settings, with the defaults of the format."""

    pieces: list[Piece] = field(default_factory=list)
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    treat_whitespace_as_suffix: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    precompiled_charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    denormalizer_charsmap: bytes = b""


# Field numbers of the messages, and the attribute each one fills.
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_TEXT, _SCORE, _TYPE = 1, 2, 3
_TRAINER_FIELDS = {
    3: "model_type", 24: "treat_whitespace_as_suffix", 35: "byte_fallback",
    40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id",
}  # fmt: skip
_NORMALIZER_FIELDS = {
    2: "precompiled_charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces",
    5: "escape_whitespaces",
}  # fmt: skip
_DENORMALIZER_FIELDS = {2: "denormalizer_charsmap"}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT = struct.Struct("<f")
_T = TypeVar("_T")


def parse(data: bytes, path: Path) -> SentencePieceModel:
    """A ModelProto from its bytes; `path` is for messages. Raises InvalidFile if it is damaged."""
    model = SentencePieceModel()
    settings = {
        _TRAINER: _TRAINER_FIELDS,
        _NORMALIZER: _NORMALIZER_FIELDS,
        _DENORMALIZER: _DENORMALIZER_FIELDS,
    }
    try:
        for number, value in _fields(data):
            if number == _PIECES:
                model.pieces.append(_piece(_expect(value, bytes)))
            elif number in settings:
                _fill(model, settings[number], _expect(value, bytes))
    except (TypeError, ValueError) as error:
        raise InvalidFile(
            f"{path} is damaged or no SentencePiece model ({error}); download it again"
        ) from None
    if not model.pieces:
        raise InvalidFile(f"{path} is no SentencePiece model: it holds no pieces")
    return model


def serialise(model: SentencePieceModel) -> bytes:
    """The ModelProto's bytes, as `sentencepiece` loads them."""
    parts = []
    for piece in model.pieces:
        body = _put(_TEXT, piece.text.encode()) + _put(_SCORE, piece.score)
        parts.append(_put(_PIECES, body + _put(_TYPE, int(piece.type))))
    for number, fields in (
        (_TRAINER, _TRAINER_FIELDS),
        (_NORMALIZER, _NORMALIZER_FIELDS),
        (_DENORMALIZER, _DENORMALIZER_FIELDS),
    ):
        body = b"".join(_put(key, getattr(model, name)) for key, name in fields.items())
        parts.append(_put(number, body))
    return b"".join(parts)


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, int(TokenType.NORMAL)
    for number, value in _fields(data):
        if number == _TEXT:
            text = _expect(value, bytes).decode()
        elif number == _SCORE:
            score = _expect(value, float)
        elif number == _TYPE:
            kind = _expect(value, int)
    if not text or not math.isfinite(score):
        raise ValueError(f"the piece {text!r} has the score {score}")
    return Piece(text, score, TokenType(kind))


def _fill(model: SentencePieceModel, names: dict[int, str], data: bytes) -> None:
    """Set the attributes a settings message names, each in the type of its default."""
    for number, value in _fields(data):
        if number in names:
            kind = type(getattr(model, names[number]))
            stored = _expect(value, bytes if kind is bytes else int)
            setattr(model, names[number], kind(stored))


def _expect(value: object, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise TypeError(f"a field holds {type(value).__name__} where {kind.__name__} belongs")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, float | bytes]]:
    """The fields of a message: (number, value). Raises ValueError where the bytes make no sense."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            # Negative numbers are written in 64 bits of two's complement.
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"a field has the unknown wire type {wire}")
        if length > len(data) - at:
            raise ValueError("it ends inside a field")
        raw = data[at : at + length]
        at += length
        yield key >> 3, _FLOAT.unpack(raw)[0] if wire == _FIXED32 else raw


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("it ends inside a number, or the number is too long")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value & (1 << 64) - 1, at


def _put(number: int, value: float | bytes) -> bytes:
    """One field: its key, and the value in the wire type of its Python type."""
    if isinstance(value, bytes):
        return _put_varint(number << 3 | _BYTES) + _put_varint(len(value)) + value
    if isinstance(value, float):
        return _put_varint(number << 3 | _FIXED32) + _FLOAT.pack(value)
    return _put_varint(number << 3 | _VARINT) + _put_varint(value & (1 << 64) - 1)


def _put_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
