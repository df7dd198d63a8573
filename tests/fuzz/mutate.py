"""Damage with a plan: numbers that break arithmetic, texts, bytes, JSON values, protobuf fields.

Everything takes a `random.Random`, so that an input is a function of (target, seed, index).
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

#: Where off-by-one, sign, width and overflow mistakes live.
NUMBERS = [0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 65535, 65536, *(
    (1 << bits) + add for bits in (24, 31, 32, 47, 48, 53, 60, 61, 62, 63) for add in (-1, 0, 1)
)]  # fmt: skip
FLOATS = [0.0, -0.0, -1.0, 1e-45, 1e-300, 3.4e38, 1e39, 1e308, *map(float, ("inf", "-inf", "nan"))]
TEXTS = [
    "", " ", "\0", "a" * 70, "a" * 70_000, "é" * 9, "\x1b[31m", "../../etc/passwd", "/dev/zero",
    "{0}", "%s%n", "{{ 9 ** 9 ** 9 }}", "\ufeff", "\ud800", "none", "null", "-1", "1e999", "weight",
    "<|im_end|>", "<0x0A>", "▁", "Ġ", "(?:a+)+$", r"(\s|\w|.)*(\s|\w|.)*x",
    r"((\p{L}{1,999}){1,999}){99}",
]  # fmt: skip
#: Stands for nesting too deep to be built as a value; `to_json` writes it.
DEEP = "\0deep\0"
DEPTH = 20_000


def number(random: Random) -> int:
    """A number that somebody forgot."""
    value = random.choice(NUMBERS)
    return -value if random.random() < 0.2 else value


def near(random: Random, value: int) -> int:
    """A number close to one that fits, or any other."""
    ways: list[Callable[[], int]] = [
        lambda: value + random.choice((-1, 1)), lambda: value * random.choice((2, 3, 16, 1 << 32)),
        lambda: value // 2, lambda: -value, lambda: number(random),
    ]  # fmt: skip
    return random.choice(ways)()


def text(random: Random) -> str:
    return random.choice(TEXTS)


def damage(random: Random, data: bytes, hot: int | None = None) -> bytes:
    """Flip, cut, repeat, insert; mostly among the first `hot` bytes, where a header lies."""
    content = bytearray(data)
    for _ in range(random.randint(1, 4)):
        if not content:
            break
        end = len(content) if hot is None or random.random() < 0.1 else min(hot, len(content))
        at = random.randrange(max(1, end))
        length = min(random.choice((1, 2, 4, 8, 64)), len(content) - at)
        match random.randrange(7):
            case 0:
                content[at] ^= 1 << random.randrange(8)
            case 1:
                content[at] = random.randrange(256)
            case 2:
                del content[at : random.choice((at + length, len(content)))]
            case 3:
                content[at:at] = content[at : at + length]
            case 4:
                content[at:at] = random.randbytes(length)
            case _:
                form = random.choice(("<I", "<Q", ">I", "<H", "<f"))
                raw = _packed(form, number(random))
                content[at : at + len(raw)] = raw
    return bytes(content)


def _packed(form: str, value: int) -> bytes:
    if form == "<f":
        return struct.pack(form, float(value % (1 << 64)))
    size = struct.calcsize(form)
    return (value % (1 << 8 * size)).to_bytes(size, "big" if form[0] == ">" else "little")


def json_value(random: Random, root: Any) -> Any:
    """A JSON value with one to three of its parts exchanged, removed or repeated."""
    root = copy.deepcopy(root)
    for _ in range(random.randint(1, 3)):
        parents = [part for part in _parts(root) if isinstance(part, dict | list) and part]
        if not parents:
            return _any_json(random, root)
        parent = random.choice(parents)
        key = (
            random.choice(list(parent))
            if isinstance(parent, dict)
            else random.randrange(len(parent))
        )
        match random.randrange(8):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[text(random)] = parent.pop(key)
            case 1:
                parent.insert(random.randrange(len(parent)), copy.deepcopy(parent[key]))
            case 2:
                parent[key] = copy.deepcopy(random.choice(_parts(root)))
            case 3 if isinstance(parent[key], int) and not isinstance(parent[key], bool):
                parent[key] = near(random, parent[key])
            case 4 if isinstance(parent[key], str):
                parent[key] = damage(random, parent[key].encode(errors="replace")).decode(
                    "utf-8", "replace"
                )
            case _:
                parent[key] = _any_json(random, parent[key])
    return root


def _parts(value: Any) -> list[Any]:
    """A value and those inside it; of long lists, some."""
    found, waiting = [], [value]
    while waiting:
        part = waiting.pop()
        found.append(part)
        inner = (
            list(part.values())
            if isinstance(part, dict)
            else part
            if isinstance(part, list)
            else []
        )
        waiting += inner[:40] + inner[-3:] if len(inner) > 43 else inner
    return found


def _any_json(random: Random, value: Any) -> Any:
    return random.choice([
        None, True, False, number(random), random.choice(FLOATS), text(random), [], {}, [value],
        {"a": value}, [value] * 3, [number(random)] * 5, str(value)[:99], {text(random): 1}, DEEP,
    ])  # fmt: skip


def to_json(value: Any) -> str:
    """JSON's text; a lone surrogate stays one, and DEEP becomes brackets in brackets."""
    return json.dumps(value).replace(json.dumps(DEEP), "[" * DEPTH + "]" * DEPTH)


def protobuf(random: Random, data: bytes, depth: int = 0) -> bytes:
    """A message with some fields exchanged, repeated, renumbered, or with a wrong length."""
    fields = _fields(data)
    if not fields:
        return damage(random, data)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(fields))
        key, payload = fields[at]
        match random.randrange(8):
            case 0:
                del fields[at]
            case 1:
                fields.insert(random.randrange(len(fields) + 1), fields[at])
            case 2:
                fields[at] = (
                    random.choice((key ^ 1, key ^ 2, key + 8, number(random) & 0xFFFF)),
                    payload,
                )
            case 3 if key & 7 == 2:
                fields[at] = (key, (number(random), payload[1]))
            case 4 if key & 7 == 2 and depth < 2:
                inner = protobuf(random, payload[1], depth + 1)
                fields[at] = (key, (len(inner), inner))
            case 5 if key & 7 == 2:
                inner = random.choice((text(random).encode("utf-8", "surrogatepass"), b"\xff", b""))
                fields[at] = (key, (len(inner), inner))
            case _ if key & 7 == 0:
                fields[at] = (key, number(random))
            case _ if key & 7 == 5:
                fields[at] = (
                    key,
                    struct.pack(
                        "<f", random.choice([f for f in FLOATS if abs(f) < 3.5e38 or f != f])
                    ),
                )
        if not fields:
            break
    return b"".join(_field(key, payload) for key, payload in fields)


def _fields(data: bytes) -> list[tuple[int, Any]]:
    """(key, payload): a number, bytes, or (length, bytes); none where the data are no message."""
    fields, at = list[tuple[int, Any]](), 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            wire = key & 7
            if wire == 0:
                value, at = _varint(data, at)
                fields.append((key, value))
                continue
            if wire == 2:
                length, at = _varint(data, at)
                fields.append((key, (length, data[at : at + length])))
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
                fields.append((key, data[at : at + length]))
            else:
                return []
            at += length
    except IndexError:
        return []
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def _field(key: int, payload: Any) -> bytes:
    if isinstance(payload, int):
        return _put(key) + _put(payload)
    if isinstance(payload, tuple):
        return _put(key) + _put(payload[0]) + payload[1]
    return _put(key) + payload


def _put(value: int) -> bytes:
    value, out = value & (1 << 64) - 1, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
