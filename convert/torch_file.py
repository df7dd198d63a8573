"""PyTorch's `.bin` files: a ZIP archive around a pickle, read without torch and without unpickling.

A pickle is a program, and one from a stranger may do anything. Here it is played by a machine that
can build dictionaries of tensors and nothing else: a name that it refers to stays a name, and
whatever it asks for beyond that is refused. Source: PEP 307 (pickle protocol 2), `pickletools` for
the operations, torch.serialization for the archive (PyTorch 1.6 and newer).
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidFile, UnsupportedModel
from .source import BYTES, InputFile, Stored

#: A list of tensors takes some hundred bytes each; an archive's directory likewise.
_LARGEST_PICKLE = _LARGEST_READ = 64 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Global:
    """A name a pickle refers to, which is never looked up."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """The numbers of one or several tensors: a file of the archive."""

    key: str
    kind: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    kind: str
    first: int
    shape: tuple[int, ...]
    in_order: bool


class _Refused(Exception):
    """What a pickle asks for and a checkpoint has no need of."""


def read_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name.

    Raises InvalidFile for a file that is damaged, UnsupportedModel for one that holds, or asks for,
    something other than tensors.
    """
    archive = _Archive(InputFile(path))
    try:
        tensors = _play(archive.pickle())
    except _Refused as refused:
        raise UnsupportedModel(
            f"{path} holds more than tensors: {refused}; do not trust it, and take a checkpoint "
            "in safetensors files"
        ) from None
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidFile(f"{path} is damaged ({error}); download it again") from None
    return {name: archive.stored(name, tensor) for name, tensor in tensors.items()}


class _Archive:
    """The ZIP file: its members lie in it as they are, so that tensors are read in place."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        if file.size < 4 or file.read(0, 4) != b"PK\3\4":
            raise UnsupportedModel(
                f"{file.path} is no file of PyTorch 1.6 or newer; save the checkpoint again, as "
                "safetensors"
            )
        try:
            members = zipfile.ZipFile(_Window(file)).infolist()  # type: ignore[arg-type]
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise InvalidFile(
                f"{file.path} is damaged or incomplete ({error}); download it again"
            ) from None
        # All lies in one folder, whose name is that of the file when it was saved.
        self.members = {member.filename.partition("/")[2]: member for member in members}
        if self.members.get("byteorder") and self.read("byteorder") != b"little":
            raise UnsupportedModel(f"{file.path} was saved on a big-endian machine; save it again")

    def pickle(self) -> bytes:
        return self.read("data.pkl")

    def read(self, name: str) -> bytes:
        offset, size = self.place(name)
        if size > _LARGEST_PICKLE:
            raise InvalidFile(f"{self.file.path}: {name} has {size} bytes; do not trust this file")
        return self.file.read(offset, size)

    def place(self, name: str) -> tuple[int, int]:
        """Where a member's bytes lie: (offset, size)."""
        member = self.members.get(name)
        if member is None:
            raise InvalidFile(f"{self.file.path} lacks {name}; download it again")
        plain = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
        if plain and 0 <= member.header_offset <= self.file.size - _LOCAL_HEADER.size:
            header = self.file.read(member.header_offset, _LOCAL_HEADER.size)
            magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            at = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
            if magic == b"PK\3\4" and at + member.file_size <= self.file.size:
                return at, member.file_size
        raise InvalidFile(
            f"{self.file.path}: {name} does not lie in the file as it is; download it again"
        )

    def stored(self, name: str, tensor: _Tensor) -> Stored:
        if not tensor.in_order:
            raise UnsupportedModel(
                f"{self.file.path}: the numbers of {name} do not lie in order, as those of a "
                "view; save the checkpoint again, as safetensors"
            )
        at, size = self.place(f"data/{tensor.storage.key}")
        width = BYTES[tensor.kind]
        if (tensor.first + math.prod(tensor.shape)) * width > size:
            raise InvalidFile(
                f"{self.file.path}: tensor {name} does not lie inside its storage; download it "
                "again"
            )
        return Stored(self.file, tensor.kind, tensor.shape, at + tensor.first * width)


class _Window(RawIOBase):
    """The file as `zipfile` wants it; a directory larger than any real one is not read."""

    def __init__(self, file: InputFile) -> None:
        self.source, self.at = file, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.source.size)[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.source.size - self.at)
        count = left if count < 0 else min(count, left)
        if count > _LARGEST_READ:
            raise zipfile.BadZipFile(f"a directory of {count} bytes")
        data = self.source.read(self.at, count)
        self.at += count
        return data


_MARK = object()
#: Operations that push what they carry.
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
    "BINSTRING",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "MARK": lambda: _MARK,
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _play(program: bytes) -> dict[str, _Tensor]:
    """Run a pickle; the result has to be a dictionary of tensors by name."""
    machine = _Machine()
    for operation, argument, _ in pickletools.genops(program):
        machine.step(operation.name, argument)
    result = machine.stack.pop()
    if not isinstance(result, dict):
        raise _Refused("it is no dictionary")
    for name, value in result.items():
        if not isinstance(value, _Tensor):
            raise _Refused(f"{name[:60]!r} is no tensor")
    return result


class _Machine:
    """A pickle machine of few operations; `stack` ends with the result."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Play one operation."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "GLOBAL":
            stack.append(_Global(*argument.split(" ", 1)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name not in ("PROTO", "STOP"):
            self._combine(name)

    def _combine(self, name: str) -> None:
        """Operations on what lies on the stack."""
        stack = self.stack
        if name == "TUPLE":
            stack.append(tuple(self._from_mark()))
        elif name == "APPEND":
            _expect(stack[-2], list).append(stack.pop())
        elif name == "APPENDS":
            items = self._from_mark()
            _expect(stack[-1], list).extend(items)
        elif name == "SETITEM":
            key, value = stack[-2:]
            del stack[-2:]
            _expect(stack[-1], dict)[_expect(key, str)] = value
        elif name == "SETITEMS":
            items = self._from_mark()
            # Text alone: the hash of nested tuples can take for ever, and so can printing them.
            names = [_expect(key, str) for key in items[::2]]
            _expect(stack[-1], dict).update(zip(names, items[1::2], strict=True))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            function, arguments = stack[-2:]
            stack[-2:] = [_call(_expect(function, _Global), _expect(arguments, tuple))]
        elif name == "BUILD":
            # What a dictionary of tensors carries besides them: versions of the modules.
            stack.pop()
            _expect(stack[-1], dict)
        else:
            raise _Refused(f"it uses the operation {name}")

    def _from_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("a mark is missing")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} stands where a {kind.__name__} belongs")
    return value


def _storage(identity: Any) -> _Storage:
    """What `torch.save` writes for a storage: ("storage", type, key, device, elements)."""
    word, kind, key, *_ = _expect(identity, tuple)
    if word != "storage" or type(kind) is not _Global or kind.name not in _STORAGES:
        raise _Refused("it refers to something other than the storage of a tensor")
    return _Storage(_expect(key, str), _STORAGES[kind.name])


def _call(function: _Global, arguments: tuple[Any, ...]) -> Any:
    """The few functions that make a dictionary of tensors."""
    match function.module, function.name:
        case "collections", "OrderedDict" if not arguments:
            return {}
        case "torch._utils", "_rebuild_parameter":
            return _expect(arguments[0], _Tensor)
        case "torch._utils", "_rebuild_tensor_v2":
            return _tensor(arguments, None)
        case "torch._utils", "_rebuild_tensor_v3":
            return _tensor(arguments, arguments[6])
    raise _Refused(f"it calls {function.module}.{function.name}"[:100])


def _tensor(arguments: tuple[Any, ...], dtype: Any) -> _Tensor:
    storage, first, shape, stride = arguments[:4]
    kind = _expect(storage, _Storage).kind
    if dtype is not None:
        name = _expect(dtype, _Global).name
        if name not in _DTYPES:
            raise _Refused(f"it holds numbers of the type {name[:40]}")
        kind = _DTYPES[name]
    sizes = (first, *_expect(shape, tuple), *_expect(stride, tuple))
    if any(type(n) is not int or not 0 <= n < 1 << 48 for n in sizes):
        raise ValueError("a tensor of impossible size")
    step, in_order = 1, True
    for size, width in zip(reversed(shape), reversed(stride), strict=True):
        in_order = in_order and (size == 1 or width == step)
        step *= size
    return _Tensor(storage, kind, first, shape, in_order)
