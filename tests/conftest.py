"""Fixtures that several files share.

Compiled kernels are kept where the user's environment says (KEELBACK_CACHE), so that only the first
run of the tests compiles them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import modelfiles
import tiny
from keelback.convert import convert
from keelback.engine.model import Model


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with trained checkpoints and corpora; without one the test is skipped."""
    folder = os.environ.get("KEELBACK_SHARED")
    if not folder:
        pytest.skip("KEELBACK_SHARED names no folder with trained checkpoints")
    return Path(folder)


@pytest.fixture(scope="session")
def demo() -> Model:
    """The embedded model."""
    return Model("demo", threads=2)


#: Types that nothing here converts to, and shapes for them: rows of whole blocks of 256.
RANDOM_TYPES = ("q4_0", "q4_k_m", *modelfiles.PURE)
SMALL = {
    "mamba-q8": modelfiles.mamba(256, 2, 16, 97),
    "mamba2-q8": modelfiles.mamba2(256, 2, 16, 8, 97),
    "gdn-q8": modelfiles.gated_deltanet(256, 2, 2, 512, 97),
}


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(variant, type) -> a tiny random checkpoint converted to GGUF, once a session.

    In one of RANDOM_TYPES: another tiny model of that architecture, with random blocks.
    """
    folder = tmp_path_factory.mktemp("tiny")

    @cache
    def checkpoint(name: str) -> Path:
        return tiny.write_checkpoint(name, folder / name)

    @cache
    def file(name: str, outtype: str = "f32") -> Path:
        if outtype in RANDOM_TYPES:
            modelfiles.write(path := folder / f"{name}-{outtype}.gguf", SMALL[name], outtype)
            return path
        return convert(checkpoint(name), folder / f"{name}-{outtype}.gguf", outtype)

    return file


@pytest.fixture(scope="session")
def tiny_model(tiny_file: Callable[[str, str], Path]) -> Callable[[str, str, str], Model]:
    """(variant, type, backend) -> a model that tests share; they put its threads back."""

    @cache
    def model(name: str, outtype: str = "f32", backend: str = "cpu") -> Model:
        # References keep keys and values in float32.
        kept = "f32" if outtype == "f32" else "f16"
        return Model(
            tiny_file(name, outtype), backend=backend, notice=lambda text: None,
            cache_type_k=kept, cache_type_v=kept,
        )  # fmt: skip

    return model
