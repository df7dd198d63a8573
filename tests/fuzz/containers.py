"""Files taken apart into fields, damaged there, and put together: GGUF and safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import gguf
import numpy as np

import mutate
from keelback.models import architectures

_KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass
class Gguf:
    """A GGUF file in parts.

    pairs    [key, kind, bytes of the value]
    tensors  [name, ne, code, offset]
    """

    pairs: list[list[Any]]
    tensors: list[list[Any]]
    data: bytes
    version: int = 3
    counts: tuple[int, int] | None = None
    alignment: int = 32

    @classmethod
    def parse(cls, path: Any) -> Gguf:
        reader = gguf.GGUFReader(path)
        pairs = []
        for field in reader.fields.values():
            if field.name.startswith("GGUF."):
                continue
            # A field is: length of its key, the key, its kind, then the value.
            raw = b"".join(part.tobytes() for part in field.parts[3:])
            pairs.append([field.name.encode(), int(field.types[0]), raw])
        tensors = [
            [
                t.name.encode(), [int(n) for n in t.shape], int(t.tensor_type),
                int(t.data_offset) - reader.data_offset,
            ]
            for t in reader.tensors
        ]  # fmt: skip
        return cls(pairs, tensors, reader.data[reader.data_offset :].tobytes())

    def pack(self) -> bytes:
        pair_count, tensor_count = self.counts or (len(self.pairs), len(self.tensors))
        out = [
            b"GGUF",
            struct.pack("<IQQ", self.version % 2**32, tensor_count % 2**64, pair_count % 2**64),
        ]
        for key, kind, raw in self.pairs:
            out += [_string(key), struct.pack("<I", kind % 2**32), raw]
        for name, ne, code, offset in self.tensors:
            out += [_string(name), struct.pack("<I", len(ne))]
            out += [struct.pack("<Q", n % 2**64) for n in ne]
            out.append(struct.pack("<IQ", code % 2**32, offset % 2**64))
        header = b"".join(out)
        return header + bytes(-len(header) % self.alignment) + self.data

    def mutated(self, random: Random) -> bytes:
        file = Gguf(
            [list(pair) for pair in self.pairs],
            [[name, list(ne), code, offset] for name, ne, code, offset in self.tensors],
            self.data, self.version, self.counts, self.alignment,
        )  # fmt: skip
        ways = [file._damage_pair] * 5 + [file._damage_tensor] * 4 + [file._damage_rest]
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            random.choice(ways)(random)
        content = file.pack()
        if random.random() < 0.15:
            content = mutate.damage(random, content, len(content) - len(file.data))
        return content

    def _damage_pair(self, random: Random) -> None:
        if not self.pairs:
            return
        at = random.randrange(len(self.pairs))
        key, kind, raw = self.pairs[at]
        match random.randrange(8):
            case 0:
                del self.pairs[at]
            case 1:
                self.pairs.insert(
                    random.randrange(len(self.pairs)), list(random.choice(self.pairs))
                )
            case 2:
                self.pairs[at][0] = random.choice((random.choice(self.pairs)[0], _text(random)))
            case 3:
                self.pairs[at][1] = random.choice((*range(14), mutate.number(random)))
            case 4:
                self.pairs[at][1:] = random.choice(self.pairs)[1:]
            case _ if kind == _ARRAY and len(raw) >= 12:
                self.pairs[at][2] = _damaged_array(random, raw)
            case _ if kind == _STRING:
                self.pairs[at][2] = random.choice(
                    (
                        _string(_text(random)),
                        struct.pack("<Q", mutate.number(random) % 2**64) + raw[8:],
                    )
                )
            case _:
                self.pairs[at][1:] = _scalar(random, kind, raw)
        if key == b"general.alignment" and at < len(self.pairs):
            self.alignment = 32

    def _damage_tensor(self, random: Random) -> None:
        if not self.tensors:
            return
        at = random.randrange(len(self.tensors))
        name, ne, _, offset = self.tensors[at]
        dimension = random.randrange(len(ne)) if ne else 0
        match random.randrange(9):
            case 0:
                del self.tensors[at]
            case 1:
                self.tensors.insert(
                    random.randrange(len(self.tensors)), list(random.choice(self.tensors))
                )
            case 2:
                self.tensors[at][0] = random.choice(
                    (random.choice(self.tensors)[0], _text(random), name[:-1])
                )
            case 3 if ne:
                ne[dimension] = mutate.near(random, ne[dimension])
            case 4:
                ne.insert(dimension, random.choice((1, 1, mutate.number(random))))
            case 5 if ne:
                random.choice((ne.reverse, ne.pop, lambda: random.shuffle(ne)))()
            case 6:
                self.tensors[at][2] = random.choice((*range(43), mutate.number(random)))
            case 7:
                other = random.choice(self.tensors)[3]
                self.tensors[at][3] = random.choice((other, offset + 4, mutate.number(random) * 32))
            case _:
                self.tensors[at][1] = list(random.choice(self.tensors)[1])

    def _damage_rest(self, random: Random) -> None:
        match random.randrange(5):
            case 0:
                self.version = mutate.number(random)
            case 1:
                self.counts = (mutate.near(random, len(self.pairs)), len(self.tensors))
            case 2:
                self.counts = (len(self.pairs), mutate.near(random, len(self.tensors)))
            case 3:
                self.data = self.data[: random.randrange(len(self.data) + 1)]
            case _:
                values = (
                    np.array(random.choices(mutate.FLOATS, k=8), np.float64).astype("<f4").tobytes()
                )
                at = random.randrange(max(1, len(self.data) - 32)) // 4 * 4
                self.data = self.data[:at] + values + self.data[at + 32 :]


def _string(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _text(random: Random) -> bytes:
    known = (*architectures(), "llama", "gpt2", "gpt-2", "no_vocab", "yarn", "linear")
    if random.random() < 0.4:
        return random.choice(known).encode()
    return random.choice((mutate.text(random).encode("utf-8", "surrogatepass"), b"\xff\xfe"))


def _scalar(random: Random, kind: int, raw: bytes) -> list[Any]:
    """A number of the same kind, or the nearest of another."""
    fits = kind in _KINDS and struct.calcsize("<" + _KINDS[kind]) == len(raw)
    value = struct.unpack("<" + _KINDS[kind], raw)[0] if fits else 0
    kind = random.choice((kind, kind, kind, *_KINDS))
    if kind in (6, 12):
        value = random.choice((*mutate.FLOATS, float(value)))
        with np.errstate(over="ignore"):
            return [kind, np.float64(value).astype("<f4" if kind == 6 else "<f8").tobytes()]
    size = struct.calcsize("<" + _KINDS.get(kind, "I"))
    whole = int(value) if value == value and abs(value) < 2**64 else 0
    return [kind, (mutate.near(random, whole) % 2 ** (8 * size)).to_bytes(size, "little")]


def _damaged_array(random: Random, raw: bytes) -> bytes:
    kind, count = struct.unpack_from("<IQ", raw)
    match random.randrange(5):
        case 0:
            kind = random.choice((*range(14), mutate.number(random)))
        case 1:
            count = mutate.near(random, count)
        case 2:
            return raw[:12]
        case 3:
            return struct.pack("<IQ", kind, 0)
        case _:
            return raw[:12] + mutate.damage(random, raw[12:], 256)
    return struct.pack("<IQ", kind % 2**32, count % 2**64) + raw[12:]


@dataclass
class Safetensors:
    """A safetensors file in parts: name -> [dtype, shape, bytes], and the texts of its metadata."""

    tensors: dict[str, list[Any]]
    metadata: dict[str, str]

    @classmethod
    def parse(cls, content: bytes) -> Safetensors:
        length = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = [entry["dtype"], entry["shape"], data[first:last]]
        return cls(tensors, metadata)

    def arrays(self) -> dict[str, np.ndarray]:
        """What a reader will see; raises where it will see nothing."""
        kinds = {
            "F32": "<f4",
            "F64": "<f8",
            "F16": "<f2",
            "I64": "<i8",
            "I32": "<i4",
            "U8": "u1",
            "BOOL": "?",
        }
        return {
            name: np.frombuffer(raw, kinds[dtype]).reshape(shape)
            for name, (dtype, shape, raw) in self.tensors.items()
        }

    def pack(self, change: Callable[[Any], Any] = lambda header: header) -> bytes:
        """The file's bytes; `change` may damage the header once everything in it fits."""
        header: dict[str, Any] = {"__metadata__": self.metadata}
        at = 0
        for name, (dtype, shape, raw) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
            at += len(raw)
        text = mutate.to_json(change(header)).encode("utf-8", "surrogatepass")
        text += b" " * (-len(text) % 8)
        return (
            struct.pack("<Q", len(text))
            + text
            + b"".join(raw for _, _, raw in self.tensors.values())
        )
