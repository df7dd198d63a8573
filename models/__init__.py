"""Architectures, written as graphs of ops; found by the name in the model file.

A file of this folder that names its architecture, `ARCHITECTURE = "mamba"`, or several that are one
graph, `ARCHITECTURES = ("nemotron_h", "nemotron_h_moe")`, is asked to build their graphs.
"""

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
    return sorted(_modules())


def build(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], path: Path) -> Graph:
    """Build the graph of a model file.

    Raises UnsupportedModel for what is no model, or of an unknown architecture; InvalidFile for a
    missing key or tensor, and for a tensor of the wrong shape.
    """
    name = str(metadata.get("general.architecture"))
    module = _modules().get(name)
    if module is None:
        kind = metadata.get("general.type", "model")
        if kind != "model":
            raise UnsupportedModel(
                f"{path} holds no model (general.type is {str(kind)[:40]!r}); give one that does"
            )
        known = ", ".join(architectures())
        raise UnsupportedModel(
            f"{path}: the architecture {name[:40]!r} is not known; keelback runs {known}"
        )
    graph = Graph()
    hyperparameters = Hyperparameters(metadata, path, name)
    weights = Namespace(tensors, path)
    try:
        graph.finish(module.build(graph, hyperparameters, weights))
    except ShapeError as error:
        raise InvalidFile(f"{path}: {error}") from None
    if unused := weights.unused():
        raise InvalidFile(
            f"{path} holds {len(unused)} tensors that {name} has no use for, "
            f"{unused[0]} among them; the file is damaged or of another version"
        )
    return graph


def _modules() -> dict[str, Any]:
    """Modules by the architectures that they build."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))
    modules = [importlib.import_module(f".{name}", __package__) for name in names]
    return {name: module for module in modules for name in _built_by(module)}


def _built_by(module: Any) -> tuple[str, ...]:
    one = getattr(module, "ARCHITECTURE", None)
    return getattr(module, "ARCHITECTURES", ()) if one is None else (one,)
