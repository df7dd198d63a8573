"""Typed access to the hyperparameters of a model file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile
from ..kernels.op import LARGEST_DIMENSION

_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The keys `<architecture>.*` of a GGUF file.

    Every reader raises InvalidFile, naming the file and the key, when the value is missing and has
    no default, is of another type, or is out of range.
    """

    metadata: Mapping[str, Any]
    path: Path
    architecture: str

    def count(self, key: str, default: Any = _REQUIRED, least: int = 1) -> int:
        """A whole number from `least` to LARGEST_DIMENSION; the default may be anything."""
        value = self._get(key, default)
        if self._name(key) not in self.metadata:
            return value
        if type(value) is not int or not least <= value <= LARGEST_DIMENSION:
            raise self._bad(key, value, f"a whole number from {least} to {LARGEST_DIMENSION}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite positive number."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self._bad(key, value, "a positive number")
        return float(value)

    def negative(self, key: str) -> float:
        """A finite number below zero."""
        value = self._get(key, _REQUIRED)
        if type(value) not in (int, float) or not float("-inf") < value < 0:
            raise self._bad(key, value, "a number below zero")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self._bad(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self._get(key, default)
        if type(value) is not str:
            raise self._bad(key, value, "a text")
        return value

    def per_layer(self, key: str, layers: int, default: Any = _REQUIRED) -> list[int]:
        """Whole numbers from 0 to LARGEST_DIMENSION, one a layer; a single one counts for all."""
        value = self._get(key, default)
        values = value.tolist() if isinstance(value, np.ndarray) else [value] * layers
        fits = all(type(n) is int and 0 <= n <= LARGEST_DIMENSION for n in values)
        if not fits or len(values) != layers:
            raise self._bad(key, value, f"{layers} whole numbers from 0 to {LARGEST_DIMENSION}")
        return values

    def flags(self, key: str, layers: int) -> list[bool] | None:
        """True or false for each layer; None where the file does not say."""
        value = self._get(key, None)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype != bool or len(value) != layers:
            raise self._bad(key, value, f"{layers} times true or false")
        return value.tolist()

    def heads(self, layer: int) -> int:
        """Heads of a layer's mixer: `attention.head_count`, one number or one a layer."""
        count = self.per_layer("attention.head_count", self.count("block_count"))[layer]
        if not count:
            raise self._bad("attention.head_count", count, "a whole number above zero")
        return count

    def head_width(self, heads: int) -> int:
        """Values of a head: `attention.key_length`, else its share of the embedding's."""
        width = self.count("attention.key_length", None)
        return width or self.divide(self.count("embedding_length"), "attention.head_count", heads)

    def divide(self, whole: int, key: str, parts: int) -> int:
        """`whole / parts` where a key's value has to divide evenly."""
        if whole % parts:
            raise self._bad(key, parts, f"a divisor of {whole}")
        return whole // parts

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(self._name(key), default)
        if value is _REQUIRED:
            raise InvalidFile(
                f"{self.path} lacks the key {self._name(key)}; convert the model again"
            )
        return value

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _bad(self, key: str, value: Any, wanted: str) -> InvalidFile:
        return InvalidFile(
            f"{self.path}: {self._name(key)} is {value!r:.60}, not {wanted}; "
            "the file is damaged or of an unknown version"
        )
