"""The small files of a checkpoint: JSON, whose keys must have certain types, and other texts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidFile, UnsupportedModel
from ..kernels.op import LARGEST_DIMENSION

_REQUIRED = object()
_SMALLEST, _LARGEST = 1e-30, 1e30
#: Bytes; a tokenizer.json of 250,000 tokens takes 30 MB.
_LARGEST_FILE = 256 << 20


class Config:
    """`config.json`; every reader raises InvalidFile naming the file and the key.

    Keys are those of transformers; `names` has what the file calls some of them.
    """

    def __init__(
        self, path: Path, values: dict[str, Any], names: Mapping[str, str] | None = None
    ) -> None:
        self.path, self.values, self._names = path, values, names or {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; absent and null give the default."""
        value = self.values.get(self.name(key))
        return default if value is None else value

    def name(self, key: str) -> str:
        """What the file calls a key."""
        return self._names.get(key, key)

    def count(self, key: str, default: Any = _REQUIRED, least: int = 1) -> int:
        """A whole number from `least` to LARGEST_DIMENSION."""
        value = self._required(key, default)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= LARGEST_DIMENSION:
            raise self._bad(key, value, f"a whole number from {least} to {LARGEST_DIMENSION}")
        return value

    def multiple(
        self, key: str, of: str, default: Any = _REQUIRED, of_default: int | None = None
    ) -> tuple[int, int]:
        """Two whole numbers of which the first is a multiple of the second.

        of_default: None where a silent config has as many of the second.
        """
        whole = self.count(key, default)
        part = self.count(of, whole if of_default is None else of_default)
        if whole % part:
            raise self._bad(key, whole, f"a multiple of {self.name(of)} {part}")
        return whole, part

    def places(self, key: str, default: Iterable[int] = ()) -> set[int]:
        """A list of whole numbers, such as those of layers."""
        value = self.get(key, list(default))
        if not isinstance(value, list) or any(type(i) is not int for i in value):
            raise InvalidFile(f"{self.path}: {self.name(key)} is no list of whole numbers")
        return set(value)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive number of ordinary size."""
        value = self._required(key, default)
        if type(value) not in (int, float) or not _SMALLEST < value < _LARGEST:
            raise self._bad(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise self._bad(key, value, "true or false")
        return value

    def one_of(self, key: str, default: str, *choices: str) -> str:
        """One of the values that keelback can run; anything else is refused, not guessed."""
        value = self.get(key, default)
        if value not in choices:
            raise UnsupportedModel(
                f"{self.path}: {self.name(key)} is {repr(value)[:80]}; keelback runs "
                f"{' or '.join(choices)}"
            )
        return value

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            name = self.name(key)
            raise InvalidFile(f"{self.path} lacks the key {name}; download the checkpoint again")
        return value

    def _bad(self, key: str, value: Any, wanted: str) -> InvalidFile:
        name = self.name(key)
        return InvalidFile(f"{self.path}: {name} is {repr(value)[:80]}, not {wanted}")


def demand(config: Config, fixed: Mapping[str, Any]) -> None:
    """Refuse options that make another model.

    fixed: the value of each that keelback runs, which is also what a silent config means.
    """
    for key, only in fixed.items():
        if (value := config.get(key, only)) != only:
            runs = "with" if only else "without"
            raise UnsupportedModel(
                f"{config.path}: {key} is {repr(value)[:80]}; keelback runs models {runs} it"
            )


def read_json_if_there(path: Path) -> dict[str, Any]:
    """`read_json`, and nothing where there is no such file."""
    return read_json(path) if os.path.exists(path) else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; transformers 5 spells infinities {"__float__": "Infinity"}.

    Raises InvalidFile when the file cannot be read or holds anything else.
    """

    def unwrap(pairs: dict[str, Any]) -> Any:
        return float(pairs["__float__"]) if set(pairs) == {"__float__"} else pairs

    try:
        values = json.loads(read_bytes(path).decode("utf-8"), object_hook=unwrap)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidFile(f"{path} cannot be read as JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise InvalidFile(f"{path} does not hold a JSON object; download it again")
    return values


def read_bytes(path: Path) -> bytes:
    """A file of a checkpoint that is no tensor file; InvalidFile for pipes, devices and giants."""
    try:
        if not path.is_file():
            raise InvalidFile(f"{path} is no ordinary file; download the checkpoint again")
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise InvalidFile(f"{path} cannot be read ({error.strerror})") from None
    if len(content) > _LARGEST_FILE:
        raise InvalidFile(f"{path} is larger than {_LARGEST_FILE >> 20} MiB; do not trust it")
    return content


def read_template(folder: Path, path: Path) -> str:
    """A text of a checkpoint that goes into the GGUF as it is, so it must be the checkpoint's own.

    Links may lead to the blobs of the hub's cache, as all of its files do; one that leads elsewhere
    could put a user's secrets into a file that is passed on: InvalidFile.
    """
    own, real = folder.resolve(), path.resolve()
    in_cache = own.parent.name == "snapshots" and real.is_relative_to(own.parent.parent / "blobs")
    if not in_cache and not real.is_relative_to(own):
        raise InvalidFile(f"{path} is a link out of the checkpoint; put the file itself there")
    return read_bytes(path).decode("utf-8")
