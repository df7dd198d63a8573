"""Snapshots on disk: a state and the conversation it belongs to, in safetensors with JSON metadata.

Tensors lie in their canonical shapes, one by one, so that a file outlives today's memory layout.
Every byte is covered by a checksum, which is also the snapshot's id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.errors import InvalidFile, InvalidInput
from ..kernels.files import replacing
from .sampling import Sampling
from .state import CacheView, State

if TYPE_CHECKING:
    from .model import Model

# What reading values of other types than they should have can come to.
_MALFORMED = (
    KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip
_LARGEST_POSITION = 1 << 48

FORMAT, VERSION = "keelback-snapshot", 1


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
        tensors, metadata = _read(path)
        if metadata.get("format") != FORMAT:
            raise InvalidFile(f"{path} is not a keelback snapshot")
        if metadata.get("version") != str(VERSION):
            raise InvalidFile(
                f"{path} has the snapshot format {metadata.get('version')!r}, and this keelback "
                f"reads {VERSION}; make it again with this version"
            )
        text = metadata.get("facts", "")
        if metadata.get("checksum") != _checksum(tensors, text):
            raise InvalidFile(f"{path} is damaged: its checksum does not fit its content")
        try:
            return cls._restore(path, json.loads(text), tensors, model, metadata["checksum"])
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
        if facts["model"] != model.fingerprint:
            raise InvalidFile(
                f"{path} belongs to another model than {model.file.path}; load it with its own"
            )
        state = model.new_state()
        if "logits" in tensors:
            state.logits = _shaped(tensors["logits"], (model.vocabulary,))
            if not np.isfinite(state.logits).all():
                raise ValueError("logits that are not finite")
        for name, view in state.tensors().items():
            view[:] = _shaped(tensors[f"state.{name}"], view.shape)
        if not np.isfinite(state.block).all():
            raise ValueError("a state that is not finite")
        position = _whole(facts["position"], _LARGEST_POSITION)
        columns = [
            _shaped(tensors[f"cache.{ref.name}"], (position, ref.width))
            for ref in model.layout.caches
        ]
        state.reserve(position)
        for ref, rows in zip(model.layout.caches, columns, strict=True):
            CacheView(state, ref).write(rows)
        state.position, state.digest = position, _whole(facts["digest"], 1 << 64)
        conversation = _conversation(facts["conversation"], tensors["recent"], model)
        if facts["numerics"] != state.numerics:
            model.notice(
                f"{path} comes from {facts['numerics']}: it goes on, though not bit for bit"
            )
        parent = None if facts["parent"] is None else _text(facts["parent"])
        return cls(state, conversation, parent, _text(facts["note"]), identity)

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = {f"state.{name}": view.copy() for name, view in self.state.tensors().items()}
        for ref in self.state.layout.caches:
            tensors[f"cache.{ref.name}"] = CacheView(self.state, ref).read(self.state.position)
        if self.state.logits is not None:
            tensors["logits"] = self.state.logits
        tensors["recent"] = np.array(self.conversation.recent, np.int64)
        return tensors

    def _facts(self) -> str:
        saved = self.conversation
        bias = {int(token): float(amount) for token, amount in saved.sampling.logit_bias.items()}
        conversation = {
            "sampling": {**dataclasses.asdict(saved.sampling), "logit_bias": bias},
            "stop": saved.stop,
            "ignore_eos": saved.ignore_eos,
            "pending": saved.pending,
            "held": saved.held,
            "undecoded": saved.undecoded.hex(),
        }
        facts = {
            "model": self.state.model,
            "numerics": self.state.numerics,
            "position": self.state.position,
            "digest": self.state.digest,
            "parent": self.parent,
            "note": self.note,
            "conversation": conversation,
        }
        # Settings may be NumPy's numbers.
        return json.dumps(facts, default=lambda number: number.item())


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata; the library checks every offset against the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise InvalidFile(f"{path}: there is no such file") from None
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise InvalidFile(f"{path} cannot be read as a snapshot ({error})") from None


def _shaped(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape != shape or array.dtype != np.float32:
        raise ValueError(
            f"a tensor is {array.dtype} {list(array.shape)}, not float32 {list(shape)}"
        )
    return array


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
