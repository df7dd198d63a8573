"""Fixtures that several files share.

Compiled kernels are kept where the user's environment says (KEELBACK_CACHE), so that only the first
run of the tests compiles them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import modelfiles
import tiny
from hubserver import CHECKPOINT, GGUF, HubServer
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


@pytest.fixture(scope="session")
def contents(tmp_path_factory, tiny_file) -> dict[str, dict[str, bytes]]:
    """What a hub has: a repository with a checkpoint, and one with GGUF files."""
    folder = tiny.write_checkpoint("mamba-tied", tmp_path_factory.mktemp("hub") / "mamba-tied")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    never = {"modeling.py": b"import os", "pytorch_model.bin": b"x" * 300, "README.md": b"#"}
    models = {
        f"mamba-{kind.upper()}.gguf": tiny_file("mamba-q8", kind).read_bytes()
        for kind in ("q8_0", "f16")
    }
    split = {f"x-Q2_K-0000{i}-of-00002.gguf": bytes([i]) * 300 for i in (1, 2)}
    return {CHECKPOINT: files | never, GGUF: models | split | {"mmproj-F16.gguf": b"p" * 300}}


@pytest.fixture
def server(contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, as the only hub there is; nothing of the user's is read or written."""
    from huggingface_hub import close_session, constants

    from keelback.convert import hub

    for name in [name for name in os.environ if name.startswith("HF_") or "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    played = HubServer()
    played.repos = {repo: dict(files) for repo, files in contents.items()}
    template = f"{played.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", played.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(hub, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("HF_ENDPOINT", played.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("KEELBACK_MODELS", str(tmp_path / "models"))
    close_session()
    yield played
    close_session()
    played.close()
