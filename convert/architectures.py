"""The architectures that can be converted: files of this folder that name their `MODEL_TYPES`."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any


@cache
def modules() -> list[Any]:
    """The modules that convert an architecture, by name.

    Others are not imported: one of them needs a library that converting does without.
    """
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    named = [file.stem for file in files if "\nMODEL_TYPES = " in file.read_text("utf-8")]
    return [importlib.import_module(f".{name}", __package__) for name in named]


def module_of(model_type: Any) -> Any:
    """The module that converts a config's model_type, None where there is none."""
    return next((module for module in modules() if model_type in module.MODEL_TYPES), None)
