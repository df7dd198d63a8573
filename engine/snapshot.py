"""Snapshots on disk: a state and the conversation it belongs to, in safetensors with JSON metadata.

Tensors lie in their canonical shapes, one by one, so that a file outlives today's memory layout.
Every byte is covered by a checksum, which is also the snapshot's id.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.errors import InvalidFile, InvalidInput
from ..kernels.files import replacing
from ..kernels.statetypes import F32, bytes_of
from .platform import available_memory
from .sampling import Sampling
from .state import CacheView, State, StatePlace

if TYPE_CHECKING:
    from .model import Model

# What reading values of other types than they should have can come to.
_MALFORMED = (
    KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip
_LARGEST_POSITION = 1 << 48
#: Bytes of a header: names and shapes, and a logit_bias of a whole vocabulary.
_LARGEST_HEADER = 16 << 20
_MOST_RECENT = 1 << 20
_LONGEST_NUMERICS = 200

_CACHED = {"k": "keys", "v": "values"}

FORMAT, VERSION = "keelback-snapshot", 3
#: Version 2 knew no other states than float32.
_READABLE = ("2", str(VERSION))


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a session remembers beside the model's state.

    recent     the last tokens, for the penalties
    pending    a token that was sampled and not yet read by the model
    held       text held back because it may begin a stop string; undecoded: bytes of a character
    """

    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    recent: tuple[int, ...] = ()
    pending: int | None = None
    held: str = ""
    undecoded: bytes = b""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A point to go on from. `id` is known once it has been saved or loaded."""

    state: State
    conversation: Conversation = field(default_factory=Conversation)
    parent: str | None = None
    note: str = ""
    id: str | None = None

    def save(self, path: str | Path) -> Snapshot:
        """Write the snapshot beside `path` and rename it; returns it with its id.

        Raises InvalidInput when the file cannot be written; an older file then stays as it is.
        """
        from safetensors.numpy import save

        if self.state.damaged:
            raise InvalidInput(f"a forward failed in this state, so {path} is not written")
        tensors, facts = self._tensors(), self._facts()
        identity = _checksum(tensors, facts)
        metadata = {"format": FORMAT, "version": str(VERSION), "checksum": identity, "facts": facts}
        with replacing(path) as partial:
            partial.write_bytes(save(tensors, metadata))
        return dataclasses.replace(self, id=identity)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> Snapshot:
        """Read a snapshot of this model; a notice is printed when its bits may go on differently.

        Raises InvalidFile for a file that is damaged, no snapshot, of another format version, or
        of another model.
        """
        path = Path(path)
        try:
            with _opened(path) as file:
                metadata = file.metadata() or {}
                _check_format(path, metadata)
                text = metadata["facts"]
                facts = json.loads(text)
                _check_model(path, facts, model)
                _check_types(path, facts, model)
                tensors = _tensors(path, file, facts, model)
            if metadata.get("checksum") != _checksum(tensors, text):
                raise InvalidFile(f"{path} is damaged: its checksum does not fit its content")
            return cls._restore(path, facts, tensors, model, metadata["checksum"])
        except (*_MALFORMED, InvalidInput) as error:
            raise InvalidFile(f"{path} does not describe a snapshot ({error})") from None

    @classmethod
    def _restore(
        cls,
        path: Path,
        facts: dict[str, Any],
        tensors: dict[str, np.ndarray],
        model: Model,
        identity: str,
    ) -> Snapshot:
        state = model.new_state()
        if "logits" in tensors:
            state.logits = tensors["logits"]
            if not np.isfinite(state.logits).all():
                raise ValueError("logits that are not finite")
        for held in model.layout.states:
            state.raw(held)[:] = bytes_of(tensors[f"state.{held.ref.name}"], held.ref.shape[:-2])
        if not all(np.isfinite(values).all() for values in state.tensors().values()):
            raise ValueError("a state that is not finite")
        position = facts["position"]
        state.reserve(position)
        for place in model.layout.caches:
            CacheView(state, place.ref).write_raw(tensors[f"cache.{place.ref.name}"])
        state.position, state.digest = position, _whole(facts["digest"], 1 << 64)
        conversation = _conversation(facts["conversation"], tensors["recent"], model)
        numerics = _text(facts["numerics"])
        if numerics != state.numerics:
            model.notice(
                f"{path} comes from {numerics[:_LONGEST_NUMERICS]}: it goes on, though not bit "
                "for bit"
            )
        parent = None if facts["parent"] is None else _text(facts["parent"])
        return cls(state, conversation, parent, _text(facts["note"]), identity)

    def _tensors(self) -> dict[str, np.ndarray]:
        state = self.state
        tensors = {
            f"state.{held.ref.name}": (
                state.view(held.ref) if held.kind is F32 else state.raw(held)
            ).copy()
            for held in state.layout.states
        }
        for place in self.state.layout.caches:
            rows = CacheView(self.state, place.ref).read_raw(self.state.position)
            tensors[f"cache.{place.ref.name}"] = rows
        if self.state.logits is not None:
            tensors["logits"] = self.state.logits
        tensors["recent"] = np.array(self.conversation.recent, np.int64)
        return tensors

    def _facts(self) -> str:
        saved = self.conversation
        conversation = {
            "sampling": dataclasses.asdict(saved.sampling),
            "stop": saved.stop,
            "ignore_eos": saved.ignore_eos,
            "pending": saved.pending,
            "held": saved.held,
            "undecoded": saved.undecoded.hex(),
        }
        facts = {
            "model": self.state.model,
            "numerics": self.state.numerics,
            "cache_types": self.state.layout.type_names,
            "state_type": self.state.layout.state_type,
            "position": self.state.position,
            "digest": self.state.digest,
            "parent": self.parent,
            "note": self.note,
            "conversation": conversation,
        }
        return json.dumps(facts)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, mapped; the library checks that every tensor lies inside it."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.exists() and not path.is_file():
            raise InvalidFile(f"{path} is no ordinary file; name a saved state")
        with open(path, "rb") as start:
            if int.from_bytes(start.read(8), "little") > _LARGEST_HEADER:
                raise InvalidFile(f"{path} is no saved state: its header is too large")
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise InvalidFile(f"{path}: there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise InvalidFile(f"{path} is no saved state of keelback, or damaged ({error})") from None


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise InvalidFile(f"{path} is not a keelback snapshot")
    if metadata.get("version") not in _READABLE:
        raise InvalidFile(
            f"{path} has the snapshot format {metadata.get('version')!r}, and this keelback "
            f"reads {VERSION}; make it again with this version"
        )


def _check_model(path: Path, facts: dict[str, Any], model: Model) -> None:
    if facts["model"] != model.fingerprint:
        raise InvalidFile(
            f"{path} belongs to another model than {model.file.path}; load it with its own"
        )


def _check_types(path: Path, facts: dict[str, Any], model: Model) -> None:
    """What was read is kept as it was: rounding it anew would change what is remembered."""
    kind = facts.get("state_type", F32.name)
    if kind != model.layout.state_type:
        kind = str(kind)[:12]
        # No command rounds to the nearest, for a state that does forgets what is small.
        nearest = kind.endswith("-nearest")
        remedy = f"load(..., state_type={kind!r})" if nearest else f"--state-type {kind}"
        raise InvalidFile(f"{path} keeps states as {kind}; load the model with {remedy}")
    theirs, ours = facts["cache_types"], model.layout.type_names
    if theirs != ours:
        kept = {kind: str(theirs[kind])[:10] for kind in ours}
        names = " and ".join(f"{_CACHED[kind]} as {name}" for kind, name in kept.items())
        options = " ".join(f"--cache-type-{kind} {name}" for kind, name in kept.items())
        raise InvalidFile(f"{path} keeps {names}; load the model with {options}")


def _tensors(path: Path, file: Any, facts: dict[str, Any], model: Model) -> dict[str, np.ndarray]:
    """All tensors, once the file is known to hold what this model needs, and memory to hold it."""
    position = _whole(facts["position"], _LARGEST_POSITION)
    shapes = {f"state.{held.ref.name}": _stored(held) for held in model.layout.states}
    shapes |= {
        f"cache.{place.ref.name}": ("U8", (position, place.ref.heads, place.row_bytes))
        for place in model.layout.caches
    }
    names = set(file.keys())
    if "logits" in names:
        shapes["logits"] = ("F32", (model.vocabulary,))
    if names != {*shapes, "recent"}:
        odd = sorted(names ^ {*shapes, "recent"})[0]
        raise ValueError(f"it lacks the tensor {odd[:80]}, or holds it without need")
    for name, (kind, shape) in shapes.items():
        _check_shape(file.get_slice(name), kind, shape)
    recent = file.get_slice("recent")
    _check_shape(recent, "I64", (min(math.prod(recent.get_shape()), _MOST_RECENT),))
    # They are in memory twice for a moment: as they come, and in their pages.
    sizes = (math.prod(shape) * (4 if kind == "F32" else 1) for kind, shape in shapes.values())
    needed = 2 * sum(sizes) + position * model.layout.bytes_per_token
    available = available_memory()
    if available is not None and needed > available:
        raise InvalidFile(f"{path} holds more than fits into memory: {position} tokens")
    return {name: file.get_tensor(name) for name in names}


def _stored(held: StatePlace) -> tuple[str, tuple[int, ...]]:
    """Type and shape of a tensor of the state in a file: its values, or each matrix's bytes."""
    if held.kind is F32:
        return "F32", held.ref.shape
    return "U8", (*held.ref.shape[:-2], held.matrix_bytes)


def _check_shape(tensor: Any, kind: str, shape: tuple[int, ...]) -> None:
    if tensor.get_dtype() != kind or tuple(tensor.get_shape()) != shape:
        raise ValueError(
            f"a tensor is {tensor.get_dtype()} {tensor.get_shape()}, not {kind} {list(shape)}"
        )


def _conversation(saved: dict[str, Any], recent: np.ndarray, model: Model) -> Conversation:
    """Raises one of _MALFORMED, or InvalidInput for settings out of range."""
    settings = dict(saved["sampling"])
    bias = {int(token): amount for token, amount in settings.pop("logit_bias").items()}
    pending = saved["pending"]
    ids = [*recent.tolist(), *([] if pending is None else [pending])]
    for token in ids:
        _whole(token, model.vocabulary)
    return Conversation(
        Sampling(**settings, logit_bias=bias),
        tuple(_text(stop) for stop in saved["stop"]),
        bool(saved["ignore_eos"]),
        tuple(recent.tolist()),
        pending,
        _text(saved["held"]),
        bytes.fromhex(saved["undecoded"]),
    )


def _whole(value: Any, limit: int) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise ValueError(f"{str(value)[:40]} is out of range")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]} is no text")
    return value


def _checksum(tensors: dict[str, np.ndarray], facts: str) -> str:
    digest = hashlib.blake2b(facts.encode(), digest_size=16)
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"\0{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
