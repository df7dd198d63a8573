"""Files exchanged with llama.cpp, both ways: the same logits, tensors, keys and token ids.

Runs where llama-cpp-python is installed. Environment variables for the rest, skipped without:

    KEELBACK_LLAMACPP_SOURCE  llama.cpp's source with its converter; llama-cpp-python's sdist has it
                              under vendor/llama.cpp
    KEELBACK_LLAMACPP_PYTHON  a Python with torch and transformers for it; default this one
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

import gguf
import numpy as np
import pytest

import tiny
from keelback.convert import convert
from keelback.convert.edit import merge, set_pair, split
from keelback.engine.model import Model
from keelback.engine.tokenizer import Tokenizer
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

# What only our files say; llama.cpp ignores keys it does not know, and reads no special ids
# where there is no tokenizer.
OURS_ALONE = {"vocab_size", "ssm.dt_b_c_rms_epsilon", "rope.rearranged_count"} | {
    f"ggml.{name}_token_id" for name in ("bos", "eos", "padding")
}
GENERAL = {
    f"general.{key}" for key in ("architecture", "type", "file_type", "quantization_version")
}
# -exp(A_log): NumPy's exp and torch's differ in the last bit. Of a float16 checkpoint llama.cpp's
# converter takes it in float16, half a unit in the eleventh bit off.
A_TOLERANCE = {"float32": 3e-7, "bfloat16": 3e-7, "float16": 6e-4}

# llama.cpp's own converter, unchanged but for two things it cannot do: it puts a vocabulary of
# 50,000 tokens into a model that has no tokenizer, and it knows pre-tokenizers only by a hash of
# ids, which leaves out every vocabulary that was not published.
CONVERTER = """
import json, runpy, sys, traceback
source, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [source, source + "/gguf-py"]
from conversion.base import TextModel
from conversion.mamba import Mamba2Model, MambaModel

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
for kind in (MambaModel, Mamba2Model):
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


def is_representable(variant: tiny.Variant) -> bool:
    """Whether llama.cpp has a way to say what this checkpoint is."""
    config = variant.config
    if variant.model_type in ("granitemoehybrid", "bamba"):
        return not config["mamba_proj_bias"]
    if variant.model_type == "gated_deltanet" or config["use_bias"]:
        return False
    if variant.model_type == "mamba2":
        return config["num_heads"] * config["head_dim"] == 2 * config["hidden_size"]
    mixer_eps = config.get("mixer_rms_eps", config["layer_norm_epsilon"])
    return config["expand"] == 2 and mixer_eps == config["layer_norm_epsilon"]


TINY = tuple(name for name, variant in tiny.VARIANTS.items() if is_representable(variant))
# What their converter misreads: a Granite with rotary positions has none for it unless all layers
# are attention, layers are not called as transformers 5 does it, and of Bamba's heads, which are
# turned in part, it rearranges the whole. The files it makes of the last two load all the same.
MISREAD = ("granite-rope", "granite-q8", "bamba-grouped")
# llama.cpp wants a bias of the convolution. Our converter writes zeros, theirs nothing.
BIASED = tuple(
    name
    for name in TINY
    if name not in MISREAD and tiny.VARIANTS[name].config.get("use_conv_bias", True)
)


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
                "pre": Model(self.ours(name)).metadata.get("tokenizer.ggml.pre"),
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


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    folder = tmp_path_factory.mktemp("llamacpp")
    yield Files(folder)
    shutil.rmtree(folder)


log: list[str] = []


@llama_cpp.llama_log_callback
def keep_log(_level: int, text: bytes, _user_data: Any) -> None:
    log.append(text.decode("utf-8", "replace"))


@pytest.fixture(scope="module", autouse=True)
def llama_backend() -> Iterator[None]:
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(keep_log, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_backend_free()


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
    return Model(path, threads=1, notice=lambda text: None).forward(ids, logits="all")[0]


def prompts(name: str) -> list[np.ndarray]:
    """What a checkpoint is asked: seeded ids, or the prompts beside a trained one."""
    if name in tiny.VARIANTS:
        return [tiny.ids(name, LENGTH)]
    reference = json.loads(shared("checkpoints", name, "reference.json").read_text("utf-8"))
    return [np.array(prompt["ids"][:LENGTH]) for prompt in reference["prompts"]]


def check_rows(what: str, got: np.ndarray, expected: np.ndarray) -> None:
    """Every row is within TOLERANCE of the expected one; the figure shows with pytest -rP."""
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    assert got.shape == expected.shape
    far = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    print(f"{what}: largest relative L2 of a row {far.max():.1e}, of {len(far)}")
    assert far.max() < TOLERANCE, f"{what}: {far.max():.1e} in row {far.argmax()}"


@pytest.mark.parametrize("name", TINY + TRAINED)
def test_llamacpp_gives_the_same_logits_for_our_files(files: Files, name: str) -> None:
    for ids in prompts(name):
        expected = our_logits(files.ours(name), ids)
        check_rows(f"{name}, our file", llama_logits(files.ours(name), ids), expected)


@pytest.mark.parametrize("name", TINY)
def test_files_that_were_split_merged_or_aligned_anew_load_in_llamacpp(
    files: Files, tmp_path: Path, name: str
) -> None:
    whole, ids = files.ours(name), tiny.ids(name, 4)
    expected = llama_logits(whole, ids)
    parts = split(whole, str(tmp_path / "part"), max_size="30K")
    assert len(parts) > 2
    aligned = set_pair(whole, "general.alignment", "64", "u32", tmp_path / "64.gguf", force=True)
    assert GGUF(aligned).alignment == 64
    aligned_parts = split(aligned, str(tmp_path / "part64"), max_tensors=5)
    for path in (parts[0], merge(parts[0], tmp_path / "merged.gguf"), aligned, aligned_parts[0]):
        assert np.array_equal(llama_logits(path, ids), expected), path.name
        assert np.array_equal(our_logits(path, ids), our_logits(whole, ids)), path.name


def test_parts_that_llamacpps_package_writes_load_in_both(files: Files, tmp_path: Path) -> None:
    whole, ids = files.ours("mamba2-g2"), tiny.ids("mamba2-g2", 4)
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba2", split_max_tensors=5)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first, *others = sorted(tmp_path.iterdir())
    assert others and np.array_equal(our_logits(first, ids), our_logits(whole, ids))
    assert np.array_equal(llama_logits(first, ids), llama_logits(whole, ids))
    assert merge(first, tmp_path / "y.gguf").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", BIASED + TRAINED)
def test_keelback_gives_the_same_logits_for_files_of_llamacpp(files: Files, name: str) -> None:
    theirs = files.theirs(name)
    for ids in prompts(name):
        got = our_logits(theirs, ids)
        check_rows(f"{name}, their file", got, llama_logits(theirs, ids))
        if name not in tiny.VARIANTS or tiny.VARIANTS[name].dtype != "float16":  # A_TOLERANCE
            check_rows(f"{name}, their file and ours", got, our_logits(files.ours(name), ids))


def test_bamba_runs_in_llamacpp_from_our_file_and_in_keelback_from_either(files: Files) -> None:
    ours, theirs = (pick("bamba-grouped") for pick in (files.ours, files.theirs))
    ids = tiny.ids("bamba-grouped", LENGTH)
    expected = our_logits(ours, ids)
    check_rows("bamba-grouped, their file and ours", our_logits(theirs, ids), expected)
    with pytest.raises(AssertionError, match=r"llama\.cpp, their file"):
        check_rows("llama.cpp, their file", llama_logits(theirs, ids), expected)


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", (*BIASED, "granite-q8", *TRAINED))
def test_both_converters_write_the_same_tensors(files: Files, name: str, outtype: str) -> None:
    ours, theirs = (read_tensors(pick(name, outtype)) for pick in (files.ours, files.theirs))
    assert ours.keys() == theirs.keys()
    dtype = tiny.VARIANTS[name].dtype if name in tiny.VARIANTS else "float32"
    for key, tensor in theirs.items():
        assert ours[key].tensor_type == tensor.tensor_type, key
        assert ours[key].shape.tolist() == tensor.shape.tolist(), key
        tolerance = A_TOLERANCE[dtype] if key.endswith("ssm_a") else 0
        np.testing.assert_allclose(ours[key].data, tensor.data, tolerance, err_msg=key)


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", BIASED + TRAINED)
def test_both_converters_write_the_same_keys(files: Files, name: str, outtype: str) -> None:
    ours, theirs = (read_keys(pick(name, outtype)) for pick in (files.ours, files.theirs))
    for key, pair in theirs.items():
        assert key in ours, f"our file lacks {key}, {pair}"
        assert ours[key] == pair, key
    extra = {key.partition(".")[2] for key in ours.keys() - theirs.keys()}
    assert extra <= OURS_ALONE


def read_tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def read_keys(path: Path) -> dict[str, tuple[list[Any], Any]]:
    """Types and values of all pairs but those that only tell people about the model."""
    return {
        key: (field.types, field.contents())
        for key, field in gguf.GGUFReader(path).fields.items()
        if not key.startswith(("general.", "GGUF.")) or key in GENERAL
    }


# Nothing stands behind the special token: with SentencePiece llama.cpp puts a space there, and
# keelback does as transformers does with this tokenizer ("legacy": false) and puts none. And every
# letter is composed: llama.cpp knows no NFC.
TAIL = "  naïve  café\n\n 日本\t👍🏽 1234.5 x=[y]; <|endoftext|</s>"


@pytest.mark.parametrize("name", TRAINED)
def test_llamacpp_finds_the_same_token_ids(files: Files, name: str) -> None:
    text = shared("corpus", "valid.txt").read_text("utf-8") + TAIL + "<|endoftext|>\n x"
    expected = Model(files.ours(name)).tokenizer.encode(text)
    assert len(expected) > 50_000
    assert llama_ids(files.ours(name), text) == expected
    assert llama_ids(files.theirs(name), text) == expected
    assert Model(files.theirs(name)).tokenizer.encode(text) == expected


@pytest.mark.parametrize("name", TRAINED)
def test_llamacpp_writes_the_same_bytes_for_every_id(files: Files, name: str) -> None:
    check_pieces(files.ours(name), Model(files.ours(name)).tokenizer)


def check_pieces(path: Path, ours: Tokenizer) -> None:
    """Bytes of every id, with and without those of control tokens, and which ids are an end."""
    room = ctypes.create_string_buffer(256)
    with llama_model(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        assert llama_cpp.llama_vocab_n_tokens(vocab) == ours.vocab_size
        for token in range(ours.vocab_size):
            for skip in (True, False):
                count = llama_cpp.llama_token_to_piece(vocab, token, room, 256, 0, not skip)
                assert room.raw[:count] == ours.piece(token, skip_special=skip), token
            assert llama_cpp.llama_vocab_is_eog(vocab, token) == (token in ours.eog_ids), token


def test_llamacpp_reads_our_sentencepiece_keys_alike(files: Files) -> None:
    """Gated DeltaNet is unknown to llama.cpp, but not the vocabulary of such a file."""
    text = shared("corpus", "valid.txt").read_text("utf-8") + TAIL
    ours = Model(files.ours("gdn-tiny")).tokenizer
    path = files.folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    for key, field in gguf.GGUFReader(files.ours("gdn-tiny")).fields.items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert llama_ids(path, text) == ours.encode(text)
    check_pieces(path, ours)


REFUSED = [name for name in tiny.VARIANTS if name not in (*TINY, "falcon-untied")]


@pytest.mark.parametrize("name", REFUSED)
def test_llamacpp_refuses_what_is_said_to_run_in_keelback_only(files: Files, name: str) -> None:
    assert keelback_only(files, name)
    with pytest.raises(AssertionError, match=r"llama\.cpp refuses"):
        llama_logits(files.ours(name), tiny.ids(name, 1))


def test_another_eps_inside_the_mixer_is_said_to_run_in_keelback_only(files: Files) -> None:
    """llama.cpp loads such a file, takes the model's eps there too, and is 10 % off here."""
    assert keelback_only(files, "falcon-untied")


@pytest.mark.parametrize("name", TINY)
def test_nothing_is_said_of_files_that_llamacpp_runs(files: Files, name: str) -> None:
    assert not keelback_only(files, name)


def keelback_only(files: Files, name: str) -> list[str]:
    """What the converter says of a checkpoint that llama.cpp cannot run as it is meant."""
    said: list[str] = []
    convert(files.checkpoint(name), files.folder / "said.gguf", "f32", said.append)
    return [text for text in said if text.startswith("for keelback only: ")]
