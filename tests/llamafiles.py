"""llama.cpp beside keelback: files of both converters, and the logits of both engines.

Importing this skips a test where llama-cpp-python is not installed. Environment variables for the
rest, skipped without:

    KEELBACK_LLAMACPP_SOURCE  llama.cpp's source with its converter; llama-cpp-python's sdist has it
                              under vendor/llama.cpp
    KEELBACK_LLAMACPP_PYTHON  a Python with torch and transformers for it; default this one
    KEELBACK_LLAMACPP_TOOLS   the folder with llama.cpp's programs, such as llama-perplexity
    KEELBACK_SHARED           the folder with the trained checkpoints and the corpus
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from distances import row_errors
from exchanged import AS_WRITTEN, BIASED, MISREAD
from keelback.convert import convert
from keelback.engine.model import Model
from keelback.kernels.formats.gguf import GGUF

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python cannot be imported", exc_type=ImportError
)

SOURCE = os.environ.get("KEELBACK_LLAMACPP_SOURCE")
PYTHON = os.environ.get("KEELBACK_LLAMACPP_PYTHON", sys.executable)
SHARED = os.environ.get("KEELBACK_SHARED")

TOLERANCE = 1e-4  # L2 distance of a row of logits, relative to the row
LENGTH = 64
TRAINED = ("mamba-tiny-lit", "mamba2-tiny")
OUTTYPES = ("f32", "f16", "bf16", "q8_0")

# llama.cpp's own converter, unchanged but for four things it cannot do: it puts a vocabulary of
# 50,000 tokens into a model that has no tokenizer, it knows pre-tokenizers only by a hash of ids,
# which leaves out every vocabulary that was not published, it does not convert a Qwen without
# layers that guess further tokens unless told so, and of some models it asks for keys that a
# transformers that knows them has renamed before it sees them.
CONVERTER = """
import json, runpy, sys, traceback
source, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [source, source + "/gguf-py"]
from conversion.base import ModelBase, TextModel
import importlib, pkgutil
import conversion
for module in pkgutil.iter_modules(conversion.__path__):
    importlib.import_module("conversion." + module.name)

known = TextModel.get_vocab_base_pre

def set_vocab(self, original):
    if (self.dir_model / "tokenizer.json").is_file():
        return original(self)
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

def get_vocab_base_pre(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return job["pre"]

TextModel.get_vocab_base_pre = get_vocab_base_pre
understood = ModelBase.load_hparams

def load_hparams(folder, *form, **named):
    if job["as_written"]:
        return json.loads((folder / "config.json").read_text("utf-8"))
    return understood(folder, *form, **named)

ModelBase.load_hparams = staticmethod(load_hparams)
conversion.qwen._QwenMtpMixin.no_mtp = True
def every(kind):
    yield kind
    for below in kind.__subclasses__():
        yield from every(below)

for kind in set(every(TextModel)):
    if "set_vocab" in vars(kind):
        kind.set_vocab = lambda self, original=kind.set_vocab: set_vocab(self, original)
errors = {}
for job in jobs:
    sys.argv = ["convert", job["checkpoint"], "--outfile", job["target"]]
    sys.argv += ["--outtype", job["outtype"]]
    try:
        runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
    except (Exception, SystemExit):
        errors[job["target"]] = traceback.format_exc()
print(json.dumps(errors))
"""


class Files:
    """Checkpoints by name, and the files that either converter makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint, self._convert_ours = cache(self._checkpoint), cache(self._ours)
        self._convert_theirs = cache(self._theirs)

    def ours(self, name: str, outtype: str = "f32") -> Path:
        """The file of our converter."""
        return self._convert_ours(name, outtype)

    def theirs(self, name: str, outtype: str = "f32") -> Path:
        """The file of llama.cpp's converter."""
        if SOURCE is None:
            pytest.skip("KEELBACK_LLAMACPP_SOURCE is not set")
        self.checkpoint(name)  # skips where it is not there
        path, errors = self.folder / f"{name}-{outtype}-theirs.gguf", self._convert_theirs()
        assert str(path) not in errors, errors[str(path)]
        return path

    def _checkpoint(self, name: str) -> Path:
        if name in tiny.VARIANTS:
            folder = tiny.write_checkpoint(name, self.folder / name)
            write_rank(folder / "config.json")
            return folder
        return shared("checkpoints", name)

    def _ours(self, name: str, outtype: str) -> Path:
        path = self.folder / f"{name}-{outtype}-ours.gguf"
        return convert(self.checkpoint(name), path, outtype)

    def _theirs(self) -> dict[str, str]:
        """Convert everything in one process: its imports take longer than all the checkpoints.

        Returns what went wrong by the path of the file.
        """
        jobs = [
            {
                "checkpoint": str(self.checkpoint(name)),
                "target": str(self.folder / f"{name}-{outtype}-theirs.gguf"),
                "outtype": outtype,
                "pre": GGUF(self.ours(name)).metadata.get("tokenizer.ggml.pre"),
                "as_written": name in AS_WRITTEN,
            }
            for name in (*BIASED, *MISREAD[1:], *(TRAINED if SHARED else ()))
            for outtype in OUTTYPES
        ]
        command = [PYTHON, "-c", CONVERTER, str(SOURCE), json.dumps(jobs)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


def write_rank(path: Path) -> None:
    """Write "auto" as the number that transformers saves: their converter knows only numbers."""
    config = json.loads(path.read_text("utf-8"))
    if config.get("time_step_rank") == "auto":
        config["time_step_rank"] = math.ceil(config["hidden_size"] / 16)
        path.write_text(json.dumps(config), encoding="utf-8")


def shared(*parts: str) -> Path:
    """A path among the shared files; skips the test without it."""
    if SHARED is None:
        pytest.skip("KEELBACK_SHARED is not set")
    path = Path(SHARED, *parts)
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


log: list[str] = []


@llama_cpp.llama_log_callback
def keep_log(_level: int, text: bytes, _user_data: Any) -> None:
    log.append(text.decode("utf-8", "replace"))


@contextmanager
def exchange(folder: Path) -> Iterator[Files]:
    """llama.cpp, ready to be used, and a folder of files that is removed at the end."""
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(keep_log, ctypes.c_void_p(0))
    yield Files(folder)
    llama_cpp.llama_backend_free()
    shutil.rmtree(folder)


@contextmanager
def llama_model(path: Path, vocab_only: bool = False) -> Iterator[Any]:
    """A model of llama.cpp on the CPU; a refusal fails with what llama.cpp said."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only = 0, vocab_only
    log.clear()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp refuses {path.name}: {''.join(log[-8:])}"
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def llama_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """Logits behind every id according to llama.cpp, one token a call: (n,) -> (n, n_vocab)."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 2 * LENGTH, 1, 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    # Flash attention rounds to F16 whatever the cache's type.
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    rows = []
    with llama_model(path) as model:
        width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        context = llama_cpp.llama_init_from_model(model, params)
        assert context, "".join(log[-8:])
        for token in ids.tolist():
            batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
            assert llama_cpp.llama_decode(context, batch) == 0, "".join(log[-8:])
            row = llama_cpp.llama_get_logits_ith(context, -1)
            rows.append(np.ctypeslib.as_array(row, (width,)).copy())
        llama_cpp.llama_free(context)
    return np.stack(rows)


def llama_ids(path: Path, text: str) -> list[int]:
    """Token ids according to the tokenizer that llama.cpp builds from a file."""
    data = text.encode()
    with llama_model(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        room = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), room, len(room), True, True)
    return room[:count]


def our_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    kept = {"cache_type_k": "f32", "cache_type_v": "f32"}
    return Model(path, threads=1, notice=lambda text: None, **kept).forward(ids, logits="all")[0]


def prompts(name: str) -> list[np.ndarray]:
    """What a checkpoint is asked: seeded ids, or the prompts beside a trained one."""
    if name in tiny.VARIANTS:
        return [tiny.ids(name, LENGTH)]
    reference = json.loads(shared("checkpoints", name, "reference.json").read_text("utf-8"))
    return [np.array(prompt["ids"][:LENGTH]) for prompt in reference["prompts"]]


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """The L2 distance of all rows together from the expected ones, relative to those."""
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    assert got.shape == expected.shape and np.isfinite(got).all()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def check_rows(
    what: str, got: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE
) -> None:
    """Every row is near the expected one; the figure shows with pytest -rP."""
    far = row_errors(got, expected).max()
    print(f"{what}: largest relative L2 of a row {far:.1e}, of {len(got)}")
    assert far < tolerance, f"{what}: {far:.1e}"
