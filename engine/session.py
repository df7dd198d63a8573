"""A conversation with a model, which can be saved between any two tokens."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.errors import InvalidInput
from .sampling import Sampling, file_defaults, sample, within
from .snapshot import Conversation, Snapshot
from .stream import TextStream
from .threads import CancelFlag

if TYPE_CHECKING:
    from .model import Model


class Session:
    """Generates text from a model.

    sampling    how tokens are chosen; without it the model file's recommendation over the built-in
                defaults, and `settings` (fields of Sampling) over both
    stop        strings that end the text; they are not part of it
    ignore_eos  whether to go on after an end-of-text token

    Raises InvalidInput for settings out of their range.
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        **settings: Any,
    ) -> None:
        self.model = model
        recommended = file_defaults(model.metadata) if sampling is None else {}
        self.sampling = replace(sampling or Sampling(), **{**recommended, **settings})
        self.ignore_eos = ignore_eos
        self.state = model.new_state()
        self.stream = TextStream(_stops(stop))
        self.pending: int | None = None
        self.recent: deque[int] = deque(maxlen=self.sampling.repeat_last_n)
        self.finish_reason: str | None = None
        self.generated = 0
        self.parent: str | None = None
        self._cancel = CancelFlag()

    @classmethod
    def resume(
        cls,
        model: Model,
        snapshot: Snapshot,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        **settings: Any,
    ) -> Session:
        """Go on from a snapshot, with its settings but for those given."""
        saved = snapshot.conversation
        sampling = replace(saved.sampling, **settings)
        session = cls(model, sampling, stop or saved.stop, ignore_eos or saved.ignore_eos)
        session.state = snapshot.state.clone()
        session.stream = TextStream(session.stream.stops, saved.held, saved.undecoded)
        session.recent.extend(saved.recent)
        session.pending, session.parent = saved.pending, snapshot.id
        return session

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt; special tokens go in front only at the very beginning."""
        if not text:
            raise InvalidInput("the prompt is empty; give some text to go on from")
        return self.model.tokenizer.encode(text, add_special=self.state.position == 0)

    def feed(
        self,
        prompt: str | Sequence[int] | np.ndarray,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Read a prompt, text or ids; returns how many ids were read.

        Raises InvalidInput for an empty prompt, KeyboardInterrupt when it is interrupted.
        """
        given = self.encode(prompt) if isinstance(prompt, str) else prompt
        ids = self.model.checked_ids(given).tolist()
        waiting = [] if self.pending is None else [self.pending]
        self._read([*waiting, *ids], progress)
        return len(waiting) + len(ids)

    def _read(self, ids: Sequence[int], progress: Callable[[int], None] | None = None) -> None:
        """Let the model read ids, the pending one first; right also when that ends half way."""
        before = self.state.position
        try:
            self.model.forward(ids, self.state, progress=progress, cancel=self._cancel)
        except KeyboardInterrupt:
            self._cancel = CancelFlag()
            raise
        finally:
            read = self.state.position - before
            if read:
                self.recent.extend(ids[0 if self.pending is None else 1 : read])
                self.pending = None

    def interrupt(self) -> None:
        """End `feed` or `generate` soon, from a signal handler or another thread.

        The session stays whole: it can be saved and gone on with. Of a prompt that was cut short,
        what `state.position` does not count has to be fed again.
        """
        self._cancel.set()

    def generate(self, limit: int | None = None) -> Iterator[str]:
        """Yield pieces of text until a stop string, an end-of-text token, or `limit` tokens.

        `finish_reason` then says "stop", "eos", "length" (also where the model's context is full)
        or "interrupted". Text that may begin a stop string stays in `stream`; `stream.flush()`
        gives it out. Raises InvalidInput for a limit that is no number of tokens.
        """
        if limit is not None and not within(limit, int, 0, math.inf):
            raise InvalidInput(f"limit is {limit!r}; give a number of tokens, or None for no end")
        self.finish_reason, self.stream.stopped = None, False
        end_ids = frozenset() if self.ignore_eos else self.model.tokenizer.eog_ids
        count = 0
        while limit is None or count < limit:
            if self._cancel.is_set:
                self._cancel = CancelFlag()
                self.finish_reason = "interrupted"
                return
            if self.pending is not None and self.model.room(self.state) == 0:
                break
            token = self.next_token()
            count += 1
            if token in end_ids:
                self.finish_reason = "eos"
                return
            text = self.stream.push(self.model.tokenizer.piece(token))
            if text:
                yield text
            if self.stream.stopped:
                self.finish_reason = "stop"
                return
        self.finish_reason = "length"

    def next_token(self) -> int:
        """Choose the next token. The model reads it only when another one is wanted."""
        if self.pending is not None:
            self._read([self.pending])
        if self.state.logits is None:
            raise InvalidInput("there is nothing to go on from; feed a prompt first")
        token = sample(self.state.logits, self.recent, self.sampling, self.state.position)
        self.pending = token
        self.recent.append(token)
        self.generated += 1
        return token

    def snapshot(self, note: str = "") -> Snapshot:
        """Everything needed to go on later, as if nothing had come between."""
        conversation = Conversation(
            sampling=self.sampling,
            stop=self.stream.stops,
            ignore_eos=self.ignore_eos,
            recent=tuple(self.recent),
            pending=self.pending,
            held=self.stream.held,
            undecoded=self.stream.undecoded,
        )
        return Snapshot(self.state.clone(), conversation, self.parent, note)


def _stops(given: str | Sequence[str]) -> Collection[str]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, Collection) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidInput(f"stop is {given!r}; give a text or a list of texts")
    return stops
