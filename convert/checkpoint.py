"""A checkpoint on disk: its config, and its tensors by name, whatever files they lie in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..kernels.errors import InvalidFile, UnsupportedModel
from .config import read_json
from .layouts import recognise
from .location import locate, no_weights, refuse_pointer, title
from .refusals import BLOCK, refuse_packed
from .safetensors_file import read_safetensors
from .source import FLOAT8, TYPES, Scaled, Source, Stored
from .torch_file import read_torch

#: Tensors that carry nothing a model needs.
_IGNORED = (
    "position_ids", "num_batches_tracked", "inv_freq", "masked_bias",
    "input_scale", "activation_scale", "k_scale", "v_scale",
)  # fmt: skip
#: What stands beside a float8 matrix: factors to multiply it with, whatever "inv" says.
_FACTORS = ("weight_scale_inv", "weight_scale")

_READERS: dict[str, Callable[[Path], dict[str, Stored]]] = {
    ".safetensors": read_safetensors,
    ".bin": read_torch,
}
#: Where weights are looked for, in this order: an index of several files, and the files themselves.
_PLACES = (
    ("model.safetensors.index.json", "[!.]*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
)


class Checkpoint:
    """A folder of config.json (or params.json) and weight files, or one weight file in it.

    Raises InvalidFile for a folder that is no checkpoint or is damaged, UnsupportedModel for
    adapters and for weights in forms that cannot be converted.
    """

    def __init__(self, path: str | Path) -> None:
        path = locate(Path(path))
        self.name = title(path)
        self.folder = path.parent if path.is_file() else path
        self.layout = recognise(self.folder)
        self.config = self.layout.config
        self.files = [path] if path.is_file() else weight_files(path)
        if not self.files:
            raise no_weights(self.folder)
        #: Tensors that belong to no language model.
        self.left_aside: list[str] = []
        self._tensors: dict[str, Source] = {}
        #: What a tensor is called in which file, for messages.
        self._origins: dict[str, tuple[Path, str]] = {}
        self._used: set[str] = set()
        for file in self.files:
            self._open(file)
        self._join_factors()

    def _open(self, file: Path) -> None:
        refuse_pointer(file)
        tensors = _READERS[file.suffix](file)
        refuse_packed(self.folder, tensors)
        for stored_name, tensor in tensors.items():
            name = self.layout.rename(stored_name)
            if name is None:
                self.left_aside.append(stored_name)
                continue
            if name in self._tensors:
                raise InvalidFile(
                    f"{file}: the tensor {stored_name} is there twice; keep the files of one copy "
                    "of the weights only"
                )
            self._tensors[name], self._origins[name] = tensor, (file, stored_name)

    def _join_factors(self) -> None:
        """Put the factors of float8 matrices to the matrices."""
        for name in [name for name in self._tensors if name.endswith(_FACTORS)]:
            weight = f"{name.rpartition('.')[0]}.weight"
            numbers = self._tensors.get(weight)
            if numbers is not None and numbers.kind in FLOAT8:
                self._tensors[weight] = self._scaled(numbers, self._tensors.pop(name), name)
        bare = [name for name, tensor in self._tensors.items() if tensor.kind in FLOAT8]
        if self.layout.block and bare:
            file, stored_name = self._origins[bare[0]]
            raise InvalidFile(
                f"{file} lacks the factors of the float8 tensor {stored_name}; download the "
                "checkpoint again"
            )

    def _scaled(self, numbers: Source, factors: Source, name: str) -> Scaled:
        """Factors are for blocks of the size that config names, for rows, or for all at once."""
        file, stored_name = self._origins[name]
        if len(numbers.shape) != 2 or factors.kind not in TYPES or 0 in factors.shape:
            raise UnsupportedModel(
                f"{file}: {stored_name} belongs to no float8 matrix; convert the checkpoint in BF16"
            )
        rows, columns = numbers.shape
        high, wide = self.layout.block or BLOCK
        grid = (-(-rows // high), -(-columns // wide))
        values = factors.read()
        if values.size == 1:
            return Scaled(numbers, values.reshape(1, 1), (rows, columns))
        # A small matrix can have as many blocks as rows: the shape tells.
        if factors.shape == grid:
            return Scaled(numbers, values, (min(high, rows), min(wide, columns)))
        if values.size == rows:
            return Scaled(numbers, values.reshape(rows, 1), (1, columns))
        raise InvalidFile(
            f"{file}: {stored_name} has the shape {list(factors.shape)}, where blocks of "
            f"{[high, wide]} of a matrix {[rows, columns]} ask for {list(grid)}; download the "
            "checkpoint again"
        )

    def find(self, name: str, *shape: int) -> Source | None:
        """A tensor seen in the shape that is asked for, or None where there is none.

        Raises InvalidFile when it has another one, dimensions of one apart, or is empty,
        UnsupportedModel when its numbers have a type that cannot be read.
        """
        source = self._tensors.get(name)
        if source is None:
            return None
        self._used.add(name)
        file, stored_name = self._origins[name]
        if source.kind not in TYPES:
            raise UnsupportedModel(
                f"{file}: tensor {stored_name} has the type {source.kind}; "
                "convert a checkpoint in F32, F16, BF16 or float8"
            )
        if 0 in source.shape:
            raise InvalidFile(f"{file}: tensor {stored_name} is empty; download it again")
        if shape and [n for n in source.shape if n != 1] != [n for n in shape if n != 1]:
            raise InvalidFile(
                f"{file}: tensor {stored_name} has the shape {list(source.shape)} where config "
                f"asks for {list(shape)}; the two do not belong together"
            )
        return source.reshaped(*shape) if shape else source

    def require(self, name: str, *shape: int) -> Source:
        """`find` for a tensor that has to be there; raises InvalidFile when it is not."""
        source = self.find(name, *shape)
        if source is None:
            raise InvalidFile(
                f"{self.folder} lacks the tensor {self._spelled(name)}; download the checkpoint "
                "again"
            )
        return source

    def first(self, *names: str) -> str:
        """The first of some names that a matrix or a norm has; the first of all where none has one.

        For what releases of a model have called differently.
        """
        there = (name for name in names if self.find(f"{name}.weight") is not None)
        return next(there, names[0])

    def _spelled(self, name: str) -> str:
        """What a tensor that is not there would be called beside those that are."""
        root, _, rest = name.partition(".")
        for known, (_, stored_name) in self._origins.items():
            _, _, bare = known.partition(".")
            if known.startswith(f"{root}.") and stored_name.endswith(bare):
                return stored_name.removesuffix(bare) + rest
        return name

    def check_all_used(self) -> None:
        """Raise UnsupportedModel when a tensor has been left aside: the result would be wrong."""
        left = [name for name in self._tensors if name not in self._used]
        left = sorted(self._origins[name][1] for name in left if not name.endswith(_IGNORED))
        if left:
            raise UnsupportedModel(
                f"{self.folder}: {len(left)} tensors have no place in this architecture, "
                f"{left[0]} among them; config.json does not describe the weights"
            )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, safetensors before pickles.

    Raises InvalidFile for an index that names no files beside it.
    """
    for index_name, pattern in _PLACES:
        index = folder / index_name
        if index.exists():
            return _indexed(index)
        # Hidden files are what some systems leave beside the real ones.
        paths = sorted(folder.glob(pattern))
        own = [path for path in paths if not path.name.startswith("consolidated")]
        if paths:
            return own or paths
    return []


def _indexed(index: Path) -> list[Path]:
    """The files an index names, all of which have to lie beside it."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise InvalidFile(f"{index} has no weight_map; download the checkpoint again")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    names = sorted({str(name) for name in mapping.values()})
    for name in names:
        if Path(name).name != name or not (name.endswith(suffix) and name.isprintable()):
            raise InvalidFile(
                f"{index} names {name[:80]!r}, which is no {suffix} file there; "
                "do not trust this checkpoint"
            )
    return [index.parent / name for name in names]
