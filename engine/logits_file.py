"""What a model expected at every token of a text, kept in a file for models to be compared with.

The format is llama.cpp's (tools/perplexity, --kl-divergence-base): "_logits_", then as int32 the
tokens of a chunk, of the vocabulary, and how many chunks; the ids of all of them; then, chunk after
chunk, a row for each token whose successor counts: a scale and the least log-probability, float32,
and 16 bits a token. What lies 16 nats below the likeliest or deeper is as good as that.

A text read in one pass is ours: "_carried", one chunk, and a row for every token but the last. Its
rows have a third float32 in front, the negative log-likelihood of the token that came, for the
differences that matter are smaller than what the depth of 16 nats makes of a surprise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..kernels.errors import InvalidFile
from ..kernels.files import check_space, check_target, replacing
from .perplexity import SMALLEST_CHUNK, normaliser

_CHUNKED, _CARRIED = b"_logits_", b"_carried"
_NUMBERS = np.dtype("<i4")
_HEADER = 8 + 3 * _NUMBERS.itemsize
_DEEPEST, _STEPS = 16, 65535
#: By how much a log-probability may exceed 0: by a step, and by what rounding leaves.
_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class Text:
    """The tokens that a file is about: `ids` (T,) int64, in chunks of `size`, or in one pass."""

    ids: np.ndarray
    vocabulary: int
    size: int | None

    @property
    def rows(self) -> int:
        """Tokens whose successor counts."""
        if self.size is None:
            return len(self.ids) - 1
        return len(self.ids) // self.size * (self.size - 1 - self.size // 2)

    @property
    def front(self) -> int:
        """What is in front of a row, in numbers of 16 bits."""
        return 6 if self.size is None else 4

    @property
    def slots(self) -> int:
        """Numbers of 16 bits in a row: an even one for the tokens."""
        return self.front + (self.vocabulary + 1) // 2 * 2

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return _HEADER + len(self.ids) * _NUMBERS.itemsize + self.rows * 2 * self.slots


class LogitsFile:
    """A file that is open for reading: its `text`, and its rows one after another.

    Raises InvalidFile for what is no such file, ends too early or contradicts itself.
    """

    def __init__(self, path: str | Path, stream: BinaryIO) -> None:
        self.path, self._stream, self._done = path, stream, 0
        self.text = self._read_text(os.fstat(stream.fileno()).st_size)

    def _read_text(self, nbytes: int) -> Text:
        head = self._stream.read(_HEADER)
        if len(head) < _HEADER or head[:8] not in (_CHUNKED, _CARRIED):
            raise InvalidFile(
                f"{self.path} holds no logits of a base model; write one with "
                "--kl-divergence-base alone"
            )
        size, vocabulary, chunks = np.frombuffer(head[8:], _NUMBERS).tolist()
        carried = head[:8] == _CARRIED
        smallest = 2 if carried else SMALLEST_CHUNK
        if size < smallest or min(vocabulary, chunks) < 1 or (carried and chunks > 1):
            raise self._broken(f"announces {chunks} chunks of {size} of {vocabulary} tokens")
        if size * chunks * _NUMBERS.itemsize > nbytes - _HEADER:
            raise self._broken("ends too early")
        ids = np.frombuffer(self._stream.read(size * chunks * _NUMBERS.itemsize), _NUMBERS)
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise self._broken("has tokens that its vocabulary does not reach")
        text = Text(ids.astype(np.int64), vocabulary, None if carried else size)
        if text.nbytes != nbytes:
            raise self._broken(f"has {nbytes} bytes where {text.nbytes} are announced")
        return text

    def read(self, count: int) -> np.ndarray:
        """The log-probabilities of the next rows: (count, vocabulary) float32."""
        text = self.text
        raw = np.frombuffer(self._stream.read(count * 2 * text.slots), "<u2")
        if len(raw) != count * text.slots:
            raise self._broken("ends too early")
        rows = raw.reshape(count, text.slots)
        front = np.ascontiguousarray(rows[:, : text.front]).view("<f4")
        scale, least = front[:, 0], front[:, 1]
        with np.errstate(invalid="ignore", over="ignore"):
            sound = (scale >= 0) & (least + scale * _STEPS <= _TOLERANCE)
        if not sound.all() or not np.isfinite(front).all():
            raise self._broken("has rows that are no log-probabilities")
        values = rows[:, text.front : text.front + text.vocabulary].astype(np.float32)
        values *= scale[:, None]
        values += least[:, None]
        if text.size is None:
            came = text.ids[self._done + 1 :][:count]
            values[np.arange(count), came] = np.minimum(-front[:, 2], _TOLERANCE)
        self._done += count
        return values

    def _broken(self, what: str) -> InvalidFile:
        return InvalidFile(f"{self.path} {what}; write it again with --kl-divergence-base")


class LogitsWriter:
    """Writes rows behind a text."""

    def __init__(self, stream: BinaryIO, text: Text) -> None:
        self._stream, self._text, self._done = stream, text, 0
        size = text.size or len(text.ids)
        numbers = np.array([size, text.vocabulary, len(text.ids) // size], _NUMBERS)
        stream.write(_CHUNKED if text.size else _CARRIED)
        stream.write(numbers.tobytes() + text.ids.astype(_NUMBERS).tobytes())

    def add(self, logits: np.ndarray) -> None:
        """Write the next rows of logits, (R, vocabulary) float32."""
        text = self._text
        for row in logits:
            self._done += 1
            came = int(text.ids[self._done]) if text.size is None else None
            self._stream.write(_encoded(row, text, came).tobytes())


def _encoded(row: np.ndarray, text: Text, came: int | None) -> np.ndarray:
    """Logits (vocabulary,) as a row: (slots,) uint16."""
    largest, total = row.max(), normaliser(row)
    least = max(row.min(), largest - _DEEPEST)
    scale = np.float32((largest - least) / _STEPS)
    out = np.zeros(text.slots, "<u2")
    front = out[: text.front].view("<f4")
    front[:2] = scale, least - total
    if came is not None:
        front[2] = total - float(row[came])
    if scale > 0:
        steps = np.rint((row - least) * (1 / scale))
        out[text.front : text.front + len(row)] = np.clip(steps, 0, _STEPS)
    return out


@contextmanager
def reading(path: str | Path) -> Iterator[LogitsFile]:
    """Open a file; raises InvalidFile where LogitsFile does, and for one that cannot be read."""
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise InvalidFile(f"{path} cannot be read ({error.strerror})") from None
    with stream:
        yield LogitsFile(path, stream)


@contextmanager
def writing(path: str | Path, text: Text) -> Iterator[LogitsWriter]:
    """A writer of a file that takes its name once all is written; raises InvalidInput as files do.

    What it takes is known, so that a disk without room for it is told of before hours of reading.
    """
    check_space(check_target(path).parent, text.nbytes, "the file of logits")
    with replacing(path) as partial, open(partial, "wb") as stream:
        yield LogitsWriter(stream, text)
