"""Arrays of texts, decoded at once or in turn: the same texts, whatever a file holds."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as some

from keelback.kernels.formats import metadata
from keelback.kernels.formats.metadata import Value


def stored(texts: list[bytes]) -> Value:
    return Value.of(texts, "arr[str]")


@given(some.lists(some.binary(max_size=9) | some.text(max_size=9).map(str.encode), max_size=9))
def test_any_texts_come_back(texts: list[bytes]):
    assert stored(texts).decode() == [text.decode("utf-8", "replace") for text in texts]


def test_a_vocabulary_is_not_read_text_by_text(monkeypatch):
    monkeypatch.setattr(metadata, "_texts_in_turn", lambda raw, count: pytest.fail("in turn"))
    texts = [b"x" * length for length in (1, 255, 256, 257, 511, 512, 65535)]
    texts += ["é".encode(), b"", b"a b", b"", "日本".encode(), b"\xff", b"z"]
    assert stored(texts).decode() == [text.decode("utf-8", "replace") for text in texts]


@pytest.mark.parametrize(
    "texts",
    [
        [b"x" * 65536, b"y"], [b"\0", b"a"], [b"a\0b", b"c"], [b"\0" * 20, b"\1" + b"\0" * 7, b"b"],
        [b"a", b""], [b"", b""], [struct.pack("<Q", 1) + b"x", struct.pack("<Q", 2)],
    ],
)  # fmt: skip
def test_texts_that_look_like_lengths_are_read_one_by_one(texts: list[bytes]):
    assert stored(texts).decode() == [text.decode() for text in texts]
    assert stored(texts).decode(1) == [texts[0].decode()]
