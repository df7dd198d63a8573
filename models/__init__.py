"""Architectures, one file each, written as graphs of ops; found by the name in the model file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidFile, UnsupportedModel
from ..kernels.formats.gguf import TensorInfo
from ..kernels.op import ShapeError
from .graph import Graph, Namespace
from .hyperparameters import Hyperparameters

#: The model that the package carries.
DEMO = Path(__file__).parent / "demo.gguf"


def architectures() -> list[str]:
    """The names of the architectures that can be run, as GGUF spells them."""
    return sorted(module.ARCHITECTURE for module in _modules())


def build(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], path: Path) -> Graph:
    """Build the graph of a model file.

    Raises UnsupportedModel for an unknown architecture, InvalidFile for a missing key or tensor and
    for a tensor of the wrong shape.
    """
    name = metadata.get("general.architecture")
    module = next((module for module in _modules() if str(name) == module.ARCHITECTURE), None)
    if module is None:
        known = ", ".join(architectures())
        raise UnsupportedModel(
            f"{path}: the architecture {str(name)[:40]!r} is not known; keelback runs {known}"
        )
    graph = Graph()
    hyperparameters = Hyperparameters(metadata, path, module.ARCHITECTURE)
    weights = Namespace(tensors, path)
    try:
        graph.finish(module.build(graph, hyperparameters, weights))
    except ShapeError as error:
        raise InvalidFile(f"{path}: {error}") from None
    if unused := weights.unused():
        raise InvalidFile(
            f"{path} holds {len(unused)} tensors that {module.ARCHITECTURE} has no use for, "
            f"{unused[0]} among them; the file is damaged or of another version"
        )
    return graph


def _modules() -> list[Any]:
    names = sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))
    modules = [importlib.import_module(f".{name}", __package__) for name in names]
    return [module for module in modules if hasattr(module, "ARCHITECTURE")]
