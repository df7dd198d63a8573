"""A Hugging Face checkpoint on disk: its config and its tensors, read through memory maps.

The safetensors header is read here because bfloat16 is unknown to NumPy: tensors come as float32.
Source: the safetensors format (an 8-byte length, a JSON header, then the data).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import InvalidFile, UnsupportedModel
from ..kernels.formats.blocks import bf16_to_f32
from .config import Config, read_json

#: How safetensors spells the types that can be read, and what their bytes are.
_TYPES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "F32": ("<f4", lambda raw: raw.astype(np.float32, copy=False)),
    "F16": ("<f2", lambda raw: raw.astype(np.float32)),
    "BF16": ("<u2", bf16_to_f32),
    "F64": ("<f8", lambda raw: raw.astype(np.float32)),
}
_LARGEST_HEADER = 100 << 20
_COMPARED_ROWS = 4096

#: Tensors that carry nothing a model needs.
_IGNORED = ("position_ids", "num_batches_tracked", "inv_freq", "masked_bias")


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor on disk: `kind` as safetensors names it, `shape` slowest dimension first."""

    file: mmap.mmap
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix; one of a single dimension is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    def read(self, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The rows of a slice or of an index, as float32: (count, width)."""
        dtype, widen = _TYPES[self.kind]
        raw = np.frombuffer(self.file, dtype, math.prod(self.shape), self.offset)
        return widen(raw.reshape(self.rows, -1)[rows])

    def equals(self, other: Source) -> bool:
        """Whether two tensors hold the same numbers; compared a few rows at a time."""
        starts = range(0, self.rows, _COMPARED_ROWS)
        return self.shape == other.shape and all(
            np.array_equal(
                self.read(slice(at, at + _COMPARED_ROWS)),
                other.read(slice(at, at + _COMPARED_ROWS)),
            )
            for at in starts
        )


class Checkpoint:
    """A folder with `config.json` and `*.safetensors`, sharded or not.

    Raises InvalidFile for a folder that is no checkpoint or is damaged, UnsupportedModel for
    adapters, quantized checkpoints and weights in pickle files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InvalidFile(
                f"{folder} is no folder; give the folder of a Hugging Face checkpoint"
            )
        self.config = Config(self.folder / "config.json", self._config())
        self.files = self._files()
        self._tensors: dict[str, Source] = {}
        self._used: set[str] = set()
        for path in self.files:
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
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
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
            for name in names:
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise InvalidFile(
                        f"{index} names {name[:80]!r}, which is no .safetensors file there; "
                        "do not trust this checkpoint"
                    )
            return [self.folder / name for name in names]
        # Hidden files are what some systems leave beside the real ones.
        paths = sorted(self.folder.glob("[!.]*.safetensors"))
        if not paths and any(self.folder.glob("*.bin")):
            raise UnsupportedModel(
                f"{self.folder} keeps its weights in .bin files; save it as safetensors first"
            )
        if not paths:
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
                    self._tensors[name] = _source(mapped, 8 + length, path, name, entry)
        except FileNotFoundError:
            raise InvalidFile(f"{path} is missing; download the checkpoint again") from None
        except OSError as error:
            raise InvalidFile(f"{path} cannot be opened: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise damaged from None

    def find(self, name: str, *shape: int) -> Source | None:
        """A tensor seen in the shape that is asked for, or None where there is none.

        Raises InvalidFile when it has another one, dimensions of one apart.
        """
        source = self._tensors.get(name)
        if source is None:
            return None
        self._used.add(name)
        if source.kind not in _TYPES:
            raise UnsupportedModel(
                f"{self.folder}: tensor {name} has the type {source.kind}; "
                "convert a checkpoint in F32, F16 or BF16"
            )
        if 0 in source.shape:
            raise InvalidFile(f"{self.folder}: tensor {name} is empty; download it again")
        if shape and [n for n in source.shape if n != 1] != [n for n in shape if n != 1]:
            raise InvalidFile(
                f"{self.folder}: tensor {name} has the shape {list(source.shape)} where config "
                f"asks for {list(shape)}; the two do not belong together"
            )
        return replace(source, shape=shape) if shape else source

    def require(self, name: str, *shape: int) -> Source:
        """`find` for a tensor that has to be there; raises InvalidFile when it is not."""
        source = self.find(name, *shape)
        if source is None:
            raise InvalidFile(
                f"{self.folder} lacks the tensor {name}; download the checkpoint again"
            )
        return source

    def check_all_used(self) -> None:
        """Raise UnsupportedModel when a tensor has been left aside: the result would be wrong."""
        left = [name for name in self._tensors if name not in self._used]
        left = sorted(name for name in left if not name.endswith(_IGNORED))
        if left:
            raise UnsupportedModel(
                f"{self.folder}: {len(left)} tensors have no place in this architecture, "
                f"{left[0]} among them; config.json does not describe the weights"
            )


def _source(mapped: mmap.mmap, start: int, path: Path, name: str, entry: dict[str, Any]) -> Source:
    kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    numbers_fit = all(type(n) is int and 0 <= n <= len(mapped) for n in (*shape, first, last))
    if not numbers_fit or first > last or start + last > len(mapped):
        raise InvalidFile(f"{path}: tensor {name} does not lie inside the file; download it again")
    if kind in _TYPES and math.prod(shape) * np.dtype(_TYPES[kind][0]).itemsize != last - first:
        raise InvalidFile(f"{path}: tensor {name} has not as many bytes as its shape says")
    return Source(mapped, kind, shape, start + first)
