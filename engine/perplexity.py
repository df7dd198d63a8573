"""How well a model foretells a text: the negative log-likelihood of every token that came.

A text is read in one of two ways. `carried`: in one pass, the state carried from the first token to
the last, as a recurrent model is used. `chunked`: llama.cpp's way (tools/perplexity), chunks of one
size that know nothing of each other, of each the second half counted. Either yields the logits of
one forward at a time, for those of a long text fit into no memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.errors import InvalidInput
from .backend import MAX_ROWS

if TYPE_CHECKING:
    from .model import Model
    from .state import State

#: Bytes of logits that a forward of ours leaves behind at most.
_LOGITS = 64 << 20
#: Tokens of a chunk: with fewer there is none to count in its second half.
SMALLEST_CHUNK = 3
#: Tokens that make a block of a comparison: neighbours are alike, blocks hardly are.
BLOCK = 256
_FEWEST_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class Rows:
    """What one forward foretold.

    first    where in the text the first of the targets stands
    targets  (R,) int64: the tokens that came
    logits   (R, vocabulary) float32: what was expected in their places
    """

    first: int
    targets: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean of negative log-likelihoods in nats, and its standard error were they independent."""

    count: int
    mean: float
    error: float

    @property
    def ppl(self) -> float:
        """The perplexity."""
        return perplexity_of(self.mean)

    @property
    def ppl_error(self) -> float:
        """The perplexity's standard error."""
        return self.ppl * self.error


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference over the same tokens, and its standard error from blocks of them."""

    mean: float
    error: float
    blocks: int


def perplexity_of(nll: float) -> float:
    """The perplexity that a mean of nats comes to; infinite where it exceeds a float."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def rows_at_once(vocabulary: int, wanted: int = MAX_ROWS) -> int:
    """Rows of a forward, `wanted` at most, so that the logits of all of them are no burden."""
    return max(1, min(wanted, MAX_ROWS, _LOGITS // (4 * vocabulary)))


def ids_of(model: Model, text: str, special: bool = False) -> np.ndarray:
    """The ids of a text, (T,) int64, without the EOS that some files want behind it.

    special: whether the texts of control tokens stand for these.
    """
    ids = np.array(model.tokenizer.encode(text, parse_special=special), np.int64)
    return ids[:-1] if model.tokenizer.add_eos else ids


def chunks_of(
    model: Model, text: str, size: int, most: int | None = None, special: bool = False
) -> np.ndarray:
    """The whole chunks that llama.cpp cuts a text into, `most` at most: (n, size) int64.

    It leaves a last line break out. Raises InvalidInput for a text of less than one chunk.
    """
    ids = ids_of(model, text.removesuffix("\n"), special)
    count = len(ids) // size
    if not count:
        raise InvalidInput(
            f"the text is too short: it has {len(ids)} tokens, and a chunk has {size}; give a "
            "longer one, or less with -c"
        )
    return ids[: count * size].reshape(count, size)[:most]


def carried(
    model: Model, ids: np.ndarray, rows: int | None = None, state: State | None = None
) -> Iterator[Rows]:
    """Read ids (T,) from first to last, T >= 2, with one state; foretells all but the first.

    state: the one to advance, else a new one.
    """
    state = model.new_state() if state is None else state
    step = rows or rows_at_once(model.vocabulary)
    for start in range(0, len(ids) - 1, step):
        end = min(start + step, len(ids) - 1)
        logits, _ = model.forward(ids[start:end], state, logits="all")
        yield Rows(start + 1, ids[start + 1 : end + 1], logits)


def chunked(model: Model, ids: np.ndarray, size: int, rows: int | None = None) -> Iterator[Rows]:
    """Read whole chunks of `size` ids, as many at once as make up `rows`, in their order.

    ids: (T,), of which an incomplete last chunk is left out. A chunk begins with BOS, in place of
    its first token, where the model's texts do; what follows the token in its middle is foretold.
    """
    step = rows or rows_at_once(model.vocabulary)
    chunks = ids[: len(ids) // size * size].reshape(-1, size)
    at_once = max(1, step // size)
    for first in range(0, len(chunks), at_once):
        for i, start, rows_of in _group(model, chunks[first : first + at_once], step):
            at = (first + i) * size + start + 1
            yield Rows(at, ids[at : at + len(rows_of)], rows_of)


def _group(model: Model, chunks: np.ndarray, step: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Read chunks beside each other; yields which one, from which row on, and logits.

    Where there are several, `step` is longer than they are: each comes in one piece.
    """
    read = begun(model, chunks)
    size = read.shape[1]
    states: list = [None] * len(read)
    # No logits are wanted of the first half, so that its forwards need no limit of their own.
    for start, end in _pieces(0, size // 2, MAX_ROWS):
        _, states = model.forward_batch(list(read[:, start:end]), states)
    for start, end in _pieces(size // 2, size - 1, step):
        logits, states = model.forward_batch(list(read[:, start:end]), states, "all")
        for i, rows_of in enumerate(logits):
            yield i, start, rows_of


def begun(model: Model, chunks: np.ndarray) -> np.ndarray:
    """Chunks (n, size) as they are read: each begins with BOS where the model's texts do."""
    read = chunks.copy()
    if model.tokenizer.add_bos:
        read[:, 0] = model.tokenizer.bos_id
    return read


def _pieces(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    for at in range(start, end, step):
        yield at, min(at + step, end)


def likelihoods(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihoods (R,) float64 of the targets (R,) under logits (R, vocabulary)."""
    values = np.empty(len(targets))
    for i, (row, target) in enumerate(zip(logits, targets, strict=True)):
        values[i] = normaliser(row) - float(row[target])
    return values


def normaliser(row: np.ndarray) -> float:
    """What has to be subtracted from logits (vocabulary,) to make them log-probabilities."""
    largest = row.max()
    return float(largest) + math.log(np.exp(row - largest).sum(dtype=np.float64))


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Of rows of logits: (R, vocabulary) float32."""
    totals = np.array([normaliser(row) for row in logits], np.float32)
    return logits - totals[:, None]


def estimate(values: np.ndarray) -> Estimate:
    """The mean of values (n,), n >= 1."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(len(values), float(values.mean()), float(error))


def compare(a: np.ndarray, b: np.ndarray, block: int = BLOCK) -> Difference:
    """How much larger the values of `a` are than those of `b`, of the same tokens in one order.

    Both (n,). What a text does to both cancels out, so that far smaller differences show than
    between two means. The error comes from the means of blocks of about `block` tokens.
    """
    if a.shape != b.shape or not len(a):
        raise InvalidInput(f"{len(a)} and {len(b)} values cannot be of the same tokens")
    apart = np.asarray(a, np.float64) - b
    count = max(len(apart) // block, min(len(apart), _FEWEST_BLOCKS))
    means = np.array([part.mean() for part in np.array_split(apart, count)])
    return Difference(float(apart.mean()), estimate(means).error, count)
