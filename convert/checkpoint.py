"""A Hugging Face checkpoint on disk: its config and its tensors, read through memory maps.

The safetensors header is read here because bfloat16 is unknown to NumPy: tensors come as float32.
Source: the safetensors format (an 8-byte length, a JSON header, then the data).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile, UnsupportedModel
from ..kernels.formats.blocks import bf16_to_f32

#: How safetensors spells the types that can be read, and what their bytes are.
_TYPES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "F32": ("<f4", lambda raw: raw.astype(np.float32, copy=False)),
    "F16": ("<f2", lambda raw: raw.astype(np.float32)),
    "BF16": ("<u2", bf16_to_f32),
    "F64": ("<f8", lambda raw: raw.astype(np.float32)),
}
_LARGEST_HEADER = 100 << 20
_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor on disk."""

    file: mmap.mmap
    kind: str
    shape: tuple[int, ...]
    offset: int

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """`count` rows from row `first` on as float32; a tensor of one dimension is one row."""
        dtype, widen = _TYPES[self.kind]
        rows = self.shape if len(self.shape) > 1 else (1, *self.shape)
        width = math.prod(rows[1:])
        count = rows[0] - first if count is None else min(count, rows[0] - first)
        start = self.offset + first * width * np.dtype(dtype).itemsize
        raw = np.frombuffer(self.file, dtype, count * width, start)
        shape = self.shape if len(self.shape) < 2 else (count, *rows[1:])
        return widen(raw).reshape(shape)


class Config:
    """`config.json`; every reader raises InvalidFile naming the file and the key."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; absent and null give the default."""
        value = self.values.get(key)
        return default if value is None else value

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """A whole number from 1 up."""
        value = self._required(key, default)
        if type(value) is not int or value < 1:
            raise self._bad(key, value, "a whole number from 1 up")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive number."""
        value = self._required(key, default)
        if type(value) not in (int, float) or not value > 0:
            raise self._bad(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value = self._required(key, default)
        if type(value) is not bool:
            raise self._bad(key, value, "true or false")
        return value

    def one_of(self, key: str, default: str, *choices: str) -> str:
        """One of the values that keelback can run; anything else is refused, not guessed."""
        value = self.get(key, default)
        if value not in choices:
            raise UnsupportedModel(
                f"{self.path}: {key} is {value!r}; keelback runs {' or '.join(choices)}"
            )
        return value

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            raise InvalidFile(f"{self.path} lacks the key {key}; download the checkpoint again")
        return value

    def _bad(self, key: str, value: Any, wanted: str) -> InvalidFile:
        return InvalidFile(f"{self.path}: {key} is {value!r}, not {wanted}")


class Checkpoint:
    """A folder with `config.json` and `*.safetensors`, sharded or not.

    Raises InvalidFile for a folder that is no checkpoint or is damaged, UnsupportedModel for
    adapters, quantized checkpoints and weights in pickle files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InvalidFile(
                f"{self.folder} is no folder; give the folder of a Hugging Face checkpoint"
            )
        self.config = Config(self.folder / "config.json", self._config())
        self.tensors: dict[str, Source] = {}
        for path in self._files():
            self._open(path)

    def _config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        if not path.exists():
            if (self.folder / "adapter_config.json").exists():
                raise UnsupportedModel(
                    f"{self.folder} holds an adapter (LoRA); merge it into its base model first"
                )
            raise InvalidFile(f"{self.folder} has no config.json; it is no Hugging Face checkpoint")
        values = read_json(path)
        quantized = values.get("quantization_config") or values.get("quantization")
        if quantized:
            method = (
                quantized.get("quant_method", "unknown")
                if isinstance(quantized, dict)
                else "unknown"
            )
            raise UnsupportedModel(
                f"{self.folder} is quantized already ({method}); convert the original checkpoint, "
                "and choose a smaller type with --outtype"
            )
        return values

    def _files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            mapping = read_json(index).get("weight_map")
            if not isinstance(mapping, dict) or not mapping:
                raise InvalidFile(f"{index} has no weight_map; download the checkpoint again")
            names = sorted({str(name) for name in mapping.values()})
            if odd := [name for name in names if Path(name).name != name]:
                raise InvalidFile(
                    f"{index} points outside its folder ({odd[0]!r}); do not trust this checkpoint"
                )
            paths = [self.folder / name for name in names]
        else:
            paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            if any(self.folder.glob("*.bin")):
                raise UnsupportedModel(
                    f"{self.folder} keeps its weights in .bin files; save it as safetensors first"
                )
            raise InvalidFile(
                f"{self.folder} holds no *.safetensors; download the checkpoint again"
            )
        return paths

    def _open(self, path: Path) -> None:
        """Read a file's header and remember where its tensors lie, after checking that they do."""
        damaged = InvalidFile(f"{path} is damaged or incomplete; download it again")
        try:
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(mapped[:8], "little")
            if not 2 <= length <= min(_LARGEST_HEADER, len(mapped) - 8):
                raise damaged
            header = json.loads(mapped[8 : 8 + length])
            for name, entry in header.items():
                if name != "__metadata__":
                    self.tensors[name] = _source(mapped, 8 + length, path, name, entry)
        except FileNotFoundError:
            raise InvalidFile(f"{path} is missing; download the checkpoint again") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise damaged from None

    def require(self, *names: str) -> Source:
        """The first of these tensors that is there; raises InvalidFile when none is."""
        for name in names:
            if name in self.tensors:
                return self.tensors[name]
        raise InvalidFile(
            f"{self.folder} lacks the tensor {names[0]}; download the checkpoint again"
        )


def _source(mapped: mmap.mmap, start: int, path: Path, name: str, entry: dict[str, Any]) -> Source:
    kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if kind not in _TYPES:
        raise UnsupportedModel(
            f"{path}: tensor {name} has the type {kind}; convert a checkpoint in F32, F16 or BF16"
        )
    nbytes = math.prod(shape) * np.dtype(_TYPES[kind][0]).itemsize
    sizes_fit = all(type(n) is int and n > 0 for n in shape) and last - first == nbytes
    if not sizes_fit or first < 0 or start + last > len(mapped):
        raise InvalidFile(f"{path}: tensor {name} does not lie inside the file; download it again")
    return Source(mapped, kind, shape, start + first)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; transformers 5 spells infinities {"__float__": "Infinity"}."""

    def unwrap(pairs: dict[str, Any]) -> Any:
        return float(pairs["__float__"]) if set(pairs) == {"__float__"} else pairs

    try:
        values = json.loads(path.read_text("utf-8"), object_hook=unwrap)
    except (OSError, ValueError) as error:
        raise InvalidFile(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise InvalidFile(f"{path} does not hold a JSON object")
    return values
