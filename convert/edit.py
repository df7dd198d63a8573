"""Rewriting GGUF files: a pair set or removed, a file split into parts, parts merged into a file.

Pairs and tensors are copied as they are stored, so that what is not meant to change, changes by no
bit. Parts are named and numbered as llama.cpp's gguf-split does it, with its options.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidInput
from ..kernels.files import check_target, replacing
from ..kernels.formats.gguf import (
    GGUF,
    SPLIT_COUNT,
    SPLIT_KINDS,
    SPLIT_NO,
    SPLIT_TENSORS,
    part_name,
)
from ..kernels.formats.gguf_writer import NewTensor, Progress, write_file
from ..kernels.formats.metadata import ALIGNMENT_KEY, KINDS, Value, valid_key
from ..kernels.formats.part import TensorInfo

#: Bytes that are copied at once.
CHUNK_BYTES = 8 << 20
#: gguf-split's parts without an option.
DEFAULT_TENSORS = 128
MAX_PARTS = 65535

#: Pairs that say how the tensors are to be read, beside those of the architecture.
_DESCRIBING = (
    "general.architecture", ALIGNMENT_KEY, "general.file_type", "general.quantization_version",
    *SPLIT_KINDS,
)  # fmt: skip
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}


def set_pair(
    path: str | Path,
    key: str,
    text: str | None,
    kind: str | None = None,
    target: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Give a key a value, or take it away (`text` None); returns the path of the file written.

    text: a number, true or false, a text as it is, or a JSON list for arrays. kind: one of KINDS;
    without it the key keeps the one it has. target: a new file; without it the file itself is
    replaced, of a model in parts the first. Raises InvalidInput for what cannot be done, and
    without `force` for a key that says how the tensors are to be read.
    """
    file = GGUF(path)
    entries = dict(file.metadata.entries)
    architecture = f"{file.metadata.get('general.architecture')}."
    if not force and (key in _DESCRIBING or key.startswith(architecture)):
        raise InvalidInput(
            f"{key} says how the tensors of {path} are to be read, and a wrong value makes it "
            "unusable; add --force to change it"
        )
    if target is None and not file.path.stat().st_mode & 0o222:
        raise InvalidInput(f"{path} is read-only; allow writing, or name another file with --out")
    if target is not None and len(file.parts) > 1:
        raise InvalidInput(f"{path} is one of several parts; merge them first, or leave out --out")
    if text is None:
        if entries.pop(key, None) is None:
            raise InvalidInput(f"{path} has no key {key} that could be removed")
    else:
        entries[key] = _parsed(key, text, kind, entries.get(key))
    path = file.path if target is None else apart(target, file)
    with replacing(path) as partial_path:
        tensors = stored(file, file.parts[0].tensors.values())
        write_file(partial_path, entries, tensors, progress)
        if target is None:
            shutil.copymode(path, partial_path)
    return path


def split(
    path: str | Path,
    prefix: str,
    max_size: str | None = None,
    max_tensors: int | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Path]:
    """Split a model into files `prefix-00001-of-00003.gguf`; returns their paths.

    max_size: bytes of tensors in a part, with K, M or G for powers of 1000; a tensor that is larger
    gets a part of its own. max_tensors: how many tensors a part has (the default, with 128). The
    first part has all pairs. Raises InvalidInput for what cannot be written.
    """
    file = GGUF(path)
    groups = _groups(file, max_size, max_tensors)
    count = len(groups)
    if count > MAX_PARTS:
        raise InvalidInput(f"{path} would become {count} parts, more than {MAX_PARTS}; allow more")
    targets = [apart(part_name(prefix, index, count), file) for index in range(count)]
    everywhere = {SPLIT_COUNT: count, SPLIT_TENSORS: len(file.tensors)}
    entries = without_split(file)
    total = sum(info.nbytes for info in file.tensors.values())
    done = 0
    with contextlib.ExitStack() as stack:
        # All parts take their names at the end, and the first part last.
        for index, (target, group) in enumerate(zip(targets, groups, strict=True)):
            for key, value in {SPLIT_NO: index, **everywhere}.items():
                entries[key] = Value.of(value, SPLIT_KINDS[key])
            partial_path = stack.enter_context(replacing(target))
            write_file(partial_path, entries, stored(file, group), _shifted(progress, done, total))
            done += sum(info.nbytes for info in group)
            entries = {key: entries[key] for key in (ALIGNMENT_KEY,) if key in entries}
    return targets


def merge(
    path: str | Path,
    target: str | Path,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Merge a model in parts, given as its first, into one file; returns its path.

    Raises InvalidInput for a file that is no part, and for a target that is one.
    """
    file = GGUF(path)
    if SPLIT_COUNT not in file.metadata:
        raise InvalidInput(f"{path} is a whole model and no part of one; there is nothing to merge")
    path = apart(target, file)
    with replacing(path) as partial_path:
        tensors = stored(file, file.tensors.values())
        write_file(partial_path, without_split(file), tensors, progress)
    return path


def stored(file: GGUF, infos: Iterable[TensorInfo]) -> list[NewTensor]:
    """Tensors of a file, to be written as they are."""
    return [
        NewTensor(
            info.name, info.shape, info.block, info.nbytes, partial(file.chunks, info, CHUNK_BYTES)
        )
        for info in infos
    ]


def without_split(file: GGUF) -> dict[str, Value]:
    """A file's pairs but those that say which part of a model it is."""
    return {key: value for key, value in file.metadata.entries.items() if key not in SPLIT_KINDS}


def apart(target: str | Path, file: GGUF) -> Path:
    """Where a file is to be written; raises InvalidInput for one that is being read."""
    check_target(target, (part.path for part in file.parts))
    return Path(target)


def _groups(
    file: GGUF, max_size: str | None, max_tensors: int | None
) -> Sequence[Sequence[TensorInfo]]:
    """The tensors of each part."""
    infos = list(file.tensors.values())
    if max_size is None:
        step = DEFAULT_TENSORS if max_tensors is None else max_tensors
        if step < 1:
            raise InvalidInput(f"{step} tensors a part are too few; give at least 1")
        return [infos[at : at + step] for at in range(0, len(infos), step)] or [[]]
    if max_tensors is not None:
        raise InvalidInput("parts are limited by their size or by their tensors, not by both")
    limit, groups, size = _bytes(max_size), [infos[:0]], 0
    for info in infos:
        padded = -(-info.nbytes // file.alignment) * file.alignment
        if groups[-1] and size + padded > limit:
            groups.append([])
            size = 0
        groups[-1].append(info)
        size += padded
    return groups


def _bytes(text: str) -> int:
    """A size as gguf-split has it: powers of 1000."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if match is None or not int(match[1]):
        raise InvalidInput(f"{text!r} is no size of a part; give one as 500M or 2G")
    return int(match[1]) * _UNITS[match[2]]


def _shifted(progress: Progress, done: int, total: int) -> Progress:
    return lambda more, _: progress(done + more, total)


def _parsed(key: str, text: str, kind: str | None, old: Value | None) -> Value:
    """The value that a text stands for, in the type that was asked for or that the key has."""
    if not valid_key(key):
        raise InvalidInput(f"{key[:40]!r} can be no key; give it printable text")
    if kind is None and old is None:
        raise InvalidInput(f"there is no key {key} yet; say its type with --type")
    kind = old.kind if kind is None and old is not None else kind
    if kind not in KINDS:
        raise InvalidInput(f"there is no type {kind!r}; choose one of {', '.join(KINDS)}")
    try:
        return Value.of(_value(text, kind), kind)
    except (ValueError, KeyError, RecursionError):
        raise InvalidInput(f"{text[:60]!r} is no value of the type {kind}") from None


def _value(text: str, kind: str) -> Any:
    if kind == "str":
        return text
    if kind.startswith("arr["):
        values = json.loads(text)
        if not isinstance(values, list):
            raise ValueError
        # What packs them would take any text for true.
        if kind == "arr[bool]" and not all(type(value) is bool for value in values):
            raise ValueError
        return values
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()]
    return float(text) if kind.startswith("f") else int(text)
