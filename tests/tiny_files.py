"""Writers of weight files: safetensors, and torch's ZIP archive around a pickle, without torch."""

import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Raw:
    """A tensor as it lies on disk: its type as safetensors names it, its shape, its bytes."""

    kind: str
    shape: tuple[int, ...]
    data: bytes


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns of bfloat16, to nearest, ties to even (no NaN here)."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _e4m3_values() -> np.ndarray:
    """The 127 positive float8 numbers of 4 bits of exponent and 3 of fraction, ascending."""
    codes = range(127)
    return np.array([math.ldexp((8 * (c > 7)) + c % 8, max(c // 8, 1) - 10) for c in codes])


E4M3 = _e4m3_values().astype(np.float32)


def _e4m3_codes(values: np.ndarray) -> np.ndarray:
    """The nearest of them, with the sign in the highest bit: uint8."""
    middles = (E4M3[1:] + E4M3[:-1]) / 2
    codes = np.searchsorted(middles, np.abs(values)).astype(np.uint8)
    return codes | (np.signbit(values).astype(np.uint8) << 7)


def float8(values: np.ndarray, block: tuple[int, int]) -> tuple[Raw, np.ndarray]:
    """A matrix as float8, and the factors of its blocks of `block` (rows, columns) in float32."""
    rows, columns = (np.arange(n) // step for n, step in zip(values.shape, block, strict=True))
    largest = np.zeros((rows[-1] + 1, columns[-1] + 1), np.float32)
    np.maximum.at(largest, (rows[:, None], columns[None]), np.abs(values))
    factors = largest / np.float32(448)
    codes = _e4m3_codes(values / factors[rows][:, columns])
    return Raw("F8_E4M3", values.shape, codes.tobytes()), factors


def dequantized(numbers: Raw, factors: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """What `float8` stands for, in float32."""
    codes = np.frombuffer(numbers.data, np.uint8).reshape(numbers.shape)
    magnitudes = E4M3[codes & 127]
    signed = np.where(codes >> 7, -magnitudes, magnitudes)
    rows, columns = (np.arange(n) // step for n, step in zip(numbers.shape, block, strict=True))
    return signed * factors[rows][:, columns]


_ENCODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F64": lambda values: values.astype("<f8"),
    "F32": lambda values: values.astype("<f4"),
    "F16": lambda values: values.astype("<f2"),
    "BF16": lambda values: _bf16_bits(values).astype("<u2"),
}


def raw(values: np.ndarray, kind: str = "F32") -> Raw:
    """A float32 array in another type."""
    return Raw(kind, values.shape, _ENCODE[kind](values).tobytes())


def read(tensor: Raw) -> np.ndarray:
    """What a tensor of one of those types holds, in float32."""
    if tensor.kind == "BF16":
        bits = np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape)
    dtype = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[tensor.kind]
    return np.frombuffer(tensor.data, dtype).astype(np.float32).reshape(tensor.shape)


def write_safetensors(path: Path, tensors: dict[str, Raw], made_by: str = "pt") -> None:
    """One safetensors file (its NumPy interface knows neither bfloat16 nor float8)."""
    header: dict[str, Any] = {"__metadata__": {"format": made_by}}
    at = 0
    for name, tensor in tensors.items():
        end = at + len(tensor.data)
        offsets = [at, end]
        header[name] = {"dtype": tensor.kind, "shape": list(tensor.shape), "data_offsets": offsets}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(tensor.data for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


_STORAGES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
}  # fmt: skip


def write_torch(path: Path, tensors: dict[str, Raw]) -> None:
    """What `torch.save` writes for a state dict: a ZIP archive of a pickle and of each storage."""
    with zipfile.ZipFile(path, "w") as archive:
        folder = path.stem
        archive.writestr(zipfile.ZipInfo(f"{folder}/data.pkl"), _pickle(tensors))
        archive.writestr(zipfile.ZipInfo(f"{folder}/byteorder"), "little")
        for key, tensor in enumerate(tensors.values()):
            archive.writestr(zipfile.ZipInfo(f"{folder}/data/{key}"), tensor.data)
        archive.writestr(zipfile.ZipInfo(f"{folder}/version"), "3\n")


def _pickle(tensors: dict[str, Raw]) -> bytes:
    """The program that builds the dictionary, in protocol 2, operation by operation."""
    empty = _name("collections", "OrderedDict") + b")R"
    program = b"\x80\x02" + empty + b"("
    for key, (name, tensor) in enumerate(tensors.items()):
        elements = math.prod(tensor.shape)
        steps = [math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
        kind = _name("torch", _STORAGES[tensor.kind])
        storage = b"(" + _text("storage") + kind + _text(str(key)) + _text("cpu")
        storage += _number(elements) + b"tQ"
        shape, strides = (b"(" + b"".join(map(_number, n)) + b"t" for n in (tensor.shape, steps))
        arguments = b"(" + storage + _number(0) + shape + strides + b"\x89" + empty + b"t"
        program += _text(name) + _name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"
    return program + b"u."


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def _number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


#: How weight files are called: (stem, suffix, writer).
SAFETENSORS = ("model", ".safetensors", write_safetensors)
TORCH = ("pytorch_model", ".bin", write_torch)


def write_shards(folder: Path, tensors: dict[str, Raw], form: Any, shards: int) -> None:
    """Several files of one form, and the index that says what lies where."""
    stem, suffix, write = form
    where, names = dict[str, str](), list(tensors)
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}"
        write(folder / file, {name: tensors[name] for name in part})
        where |= dict.fromkeys(part, file)
    total = sum(len(tensor.data) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    text = json.dumps(index, indent=2, sort_keys=True)
    (folder / f"{stem}{suffix}.index.json").write_text(text + "\n", encoding="utf-8")
