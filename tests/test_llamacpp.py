"""Files exchanged with llama.cpp, both ways: the same logits, tensors, keys and token ids."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import llamafiles
import tiny
from exchanged import BIASED, TINY
from keelback.convert import convert
from keelback.convert.edit import merge, set_pair, split
from keelback.engine.model import Model
from keelback.engine.tokenizer import Tokenizer
from keelback.kernels.formats.gguf import GGUF
from llamafiles import (
    LENGTH,
    OUTTYPES,
    TRAINED,
    Files,
    check_rows,
    llama_cpp,
    llama_ids,
    llama_logits,
    llama_model,
    our_logits,
    prompts,
    shared,
)  # fmt: skip

# What only our files say; llama.cpp ignores keys it does not know, and reads no special ids
# where there is no tokenizer.
OURS_ALONE = {
    "vocab_size", "ssm.dt_b_c_rms_epsilon", "rope.rearranged_count", "expert_group_count",
} | {f"ggml.{name}_token_id" for name in ("bos", "eos", "padding")}  # fmt: skip
GENERAL = {
    f"general.{key}" for key in ("architecture", "type", "file_type", "quantization_version")
}
# -exp(A_log): NumPy's exp and torch's differ in the last bit. Of a float16 checkpoint llama.cpp's
# converter takes it in float16, half a unit in the eleventh bit off.
A_TOLERANCE = {"float32": 3e-7, "bfloat16": 3e-7, "float16": 6e-4}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    with llamafiles.exchange(tmp_path_factory.mktemp("llamacpp")) as files:
        yield files


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


REFUSED = [
    name
    for name, variant in tiny.VARIANTS.items()
    if name not in (*TINY, "falcon-untied") and variant.model_type not in tiny.FAMILIES
] + [name for family in tiny.FAMILIES.values() for name in family.said]


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
