"""Bytes in, text out: holds back half characters, and text that may become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Collection


class TextStream:
    """Decodes a token stream, and ends it before the stop string that is complete first.

    `held` is text that may be the start of a stop string, `undecoded` bytes of a character whose
    rest has not come; both belong to a snapshot.
    """

    def __init__(self, stops: Collection[str] = (), held: str = "", undecoded: bytes = b"") -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self.held = held
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.setstate((undecoded, 0))

    @property
    def undecoded(self) -> bytes:
        """The bytes of an incomplete character."""
        return self._decoder.getstate()[0]

    def push(self, piece: bytes) -> str:
        """Take the bytes of one token; returns the text that is safe to show."""
        return self._release(self.held + self._decoder.decode(piece))

    def flush(self) -> str:
        """Give out what is held back, when nothing will follow."""
        text, self.held = self.held + self._decoder.decode(b"", True), ""
        return text

    def _release(self, text: str) -> str:
        found = [(text.find(stop), len(stop)) for stop in self.stops if stop in text]
        if found:
            self.stopped, self.held = True, ""
            self._decoder.reset()
            # The stop that is complete first, as if the text had come character by character.
            return text[: min((at + length, at) for at, length in found)[1]]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
