"""Where a checkpoint lies: a folder, one file of weights, the cache of the Hugging Face hub.

What is no checkpoint, or one in another program's format, is refused with a sentence that says what
to take instead.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..kernels.errors import InvalidFile, KeelbackError, UnsupportedModel

#: What describes a model: transformers' file, or Mistral's.
_CONFIGS = ("config.json", "params.json")

#: Names of weight files that say nothing about the model.
_NAMELESS = ("model", "pytorch_model", "consolidated")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_POINTER = b"version https://git-lfs"

_SAVE = "load it where it was made and write it with save_pretrained"
#: Other programs' formats: where they are found in a folder, what they are, and what to do.
_FORMATS = (
    (("*.gguf",), "GGUF, which runs as it is", "take the original checkpoint to convert it anew"),
    (("*.onnx", "onnx/*.onnx"), "ONNX", "take the original checkpoint"),
    (("*.h5",), "TensorFlow's", _SAVE),
    (("*.msgpack",), "Flax's", _SAVE),
    (("*.pt", "*.pth", "*.ckpt", "*.distcp", "*.nemo"), "those of a training run", _SAVE),
    (("*.npz",), "MLX's", "take the original checkpoint"),
)


def locate(path: Path) -> Path:
    """The folder or file of a checkpoint; a folder of the hub's cache leads to its snapshot.

    Raises InvalidFile or UnsupportedModel for what is none.
    """
    if os.path.isfile(path):
        _check_file(path)
        return path
    if not os.path.isdir(path):
        raise InvalidFile(
            f"{path} is no folder; give the folder of a Hugging Face checkpoint, or download one: "
            "keelback pull USER/MODEL"
        )
    if not os.access(path, os.R_OK | os.X_OK):
        raise InvalidFile(f"{path} cannot be read; check its permissions")
    return _snapshot(path)


def title(path: Path) -> str:
    """What a checkpoint is called, by its folder or its file."""
    path = Path(os.path.abspath(path))
    if os.path.isfile(path):
        path = path.parent if path.stem in _NAMELESS else path.with_suffix("")
    repository = path.parent.parent.name
    cached = path.parent.name == "snapshots" and repository.startswith("models--")
    name = repository.rpartition("--")[2] if cached else path.name
    # The name of a folder may hold bytes that are no text.
    return name.encode(errors="replace").decode()


def no_config(folder: Path) -> KeelbackError:
    """The sentence for a folder without config."""
    below = [child for child in sorted(folder.iterdir()) if _may_be_checkpoint(child)]
    if below:
        these = "one" if len(below) == 1 else f"{len(below)}"
        return InvalidFile(f"{folder} is no checkpoint, but holds {these}; give {below[0]}")
    if list(folder.glob("[!.]*.safetensors")) or list(folder.glob("pytorch_model*.bin")):
        return InvalidFile(f"{folder} has weights but no config.json; download it too")
    other = _other_format(folder)
    return other or InvalidFile(f"{folder} has no config.json; it is no Hugging Face checkpoint")


def no_weights(folder: Path) -> KeelbackError:
    """The sentence for a folder without weights."""
    return _other_format(folder) or InvalidFile(
        f"{folder} holds neither *.safetensors nor pytorch_model*.bin; download the checkpoint "
        "again"
    )


def refuse_pointer(path: Path) -> None:
    """Raise InvalidFile for what Git leaves in place of a large file."""
    try:
        if not path.is_file():
            return  # The reader of the file has a sentence for this, and for errors.
        with open(path, "rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return
    if start == _POINTER:
        raise InvalidFile(
            f"{path} is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`"
        )


def _check_file(path: Path) -> None:
    for patterns, kind, remedy in _FORMATS:
        if any(path.match(pattern) for pattern in patterns):
            raise UnsupportedModel(f"{path}: these weights are {kind}; {remedy}")
    if path.suffix not in (".safetensors", ".bin"):
        raise InvalidFile(f"{path} is no folder; give the folder of a Hugging Face checkpoint")
    if _SHARD.search(path.stem):
        raise InvalidFile(f"{path} is one of several files; give the folder {path.parent}")


def _other_format(folder: Path) -> UnsupportedModel | None:
    for patterns, kind, remedy in _FORMATS:
        if any(True for pattern in patterns for _ in folder.glob(pattern)):
            return UnsupportedModel(f"{folder}: the weights there are {kind}; {remedy}")
    return None


def _snapshot(folder: Path) -> Path:
    """In the hub's cache `models--org--name/refs/main` names a folder of its `snapshots`."""
    snapshots = folder if folder.name == "snapshots" else folder / "snapshots"
    if _has_config(folder) or not os.path.isdir(snapshots):
        return folder
    found = [child for child in sorted(snapshots.iterdir()) if _has_config(child)]
    try:
        main = (snapshots.parent / "refs" / "main").read_text("ascii").strip()
    except (OSError, ValueError):
        main = ""
    chosen = [child for child in found if child.name == main or len(found) == 1]
    if not chosen:
        raise InvalidFile(
            f"{folder} holds {len(found)} snapshots of a checkpoint; give the folder of one of them"
        )
    return chosen[0]


def _has_config(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in _CONFIGS)


def _may_be_checkpoint(folder: Path) -> bool:
    return _has_config(folder) or os.path.isdir(folder / "snapshots")
