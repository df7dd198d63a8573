"""Tiny checkpoints with other values in their configs, and what the converter says to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import keelback
import tiny
from keelback.convert import convert


def edit(folder: Path, **changes: object) -> Path:
    """Other values in a checkpoint's config; `...` takes a key away."""
    config = json.loads((folder / "config.json").read_text("utf-8")) | changes
    tiny.write_config(folder, {key: value for key, value in config.items() if value is not ...})
    return folder


def edited(name: str, folder: Path, **changes: object) -> Path:
    """A checkpoint below a folder with other values in its config."""
    return edit(tiny.write_checkpoint(name, folder / name), **changes)


def refused(path: Path, said: str, error: type = keelback.UnsupportedModel) -> None:
    """The converter refuses a checkpoint, and leaves no file behind."""
    target = path.parent / "out.gguf"
    with pytest.raises(error, match=said):
        convert(path, target)
    assert not target.exists() and not list(path.parent.glob(".*partial"))
