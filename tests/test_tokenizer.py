"""Tokenizers: converting and rebuilding them, with vocabularies made on the spot."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models

from keelback.convert import config as convert_config
from keelback.convert.tokenizer import read_tokenizer
from keelback.convert.tokenizer_settings import Settings
from keelback.engine import byte_level
from keelback.engine import tokenizer as engine_tokenizer
from keelback.engine.tokenizer import Tokenizer
from keelback.kernels.errors import InvalidFile, InvalidInput, KeelbackError, UnsupportedModel
from keelback.kernels.formats import pretokenizers, spm
from keelback.kernels.formats.gguf import GGUF
from vocabularies import (
    HERE,
    LINES,
    SPELLINGS,
    frame,
    make,
    regex,
    save,
    sentencepiece_model,
)

PACKAGE = Path(engine_tokenizer.__file__).parents[1]


def test_model_file_round_trip() -> None:
    model = spm.parse(sentencepiece_model(), HERE)
    again = spm.serialise(model)
    assert spm.parse(again, HERE) == model
    load = sentencepiece.SentencePieceProcessor
    ours, theirs = load(model_proto=again), load(model_proto=sentencepiece_model())
    assert [ours.encode(line) for line in LINES] == [theirs.encode(line) for line in LINES]
    assert model.pieces[3] == spm.Piece("[INST]", 0.0, spm.TokenType.CONTROL)
    assert (model.pad_id, model.byte_fallback, model.model_type) == (-1, True, spm.BPE)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "no pieces"), (b"\x0a\x7f", "inside a field"), (b"\x0a", "inside a number"),
        (b"\xff" * 11, "too long"), (b"\x0b", "wire type 3"), (b"\x08\x01", "int where bytes"),
        (b"\x0a\x02\x08\x01", "int where bytes"), (b"\x0a\x03\x0a\x01\xff", "utf-8"),
        (b"\x0a\x05\x0a\x01a\x18\x09", "9 is not a valid"), (b"\x0a\x02\x18\x01", "piece ''"),
        (b"\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x7f", "score nan"),
        (b"\x12\x03\x1a\x01a", "bytes where"),
    ],
)  # fmt: skip
def test_damaged_model_files(data: bytes, what: str) -> None:
    with pytest.raises(InvalidFile, match=f"model.gguf.*{what}"):
        spm.parse(data, HERE)
    draw = random.Random(what)
    for _ in range(40):
        mutated = bytearray(sentencepiece_model()[: draw.randrange(1, len(sentencepiece_model()))])
        mutated[draw.randrange(len(mutated))] = draw.randrange(256)
        with contextlib.suppress(InvalidFile):  # and nothing else
            spm.parse(bytes(mutated), HERE)


@pytest.mark.parametrize("parts", [0, 1 << 40])
@pytest.mark.parametrize("name", SPELLINGS)
def test_byte_level_is_rebuilt(name: str, parts: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(byte_level, "_FEW_PARTS", parts)  # the whole vocabulary, or what is needed
    original = make(name)
    pairs = read_tokenizer(save(tmp_path, original), 410)
    assert pairs["tokenizer.ggml.pre"] == name
    ours = Tokenizer.from_metadata(pairs, HERE)
    for line in LINES:
        ids = original.encode(line).ids
        assert ours.encode(line, add_special=False) == ids
        assert ours.decode(ids) == original.decode(ids)
        assert ours.decode(ids, skip_special=False) == original.decode(ids, False)
    original.encode_special_tokens = True
    for line in LINES:
        assert ours.encode(line, parse_special=False) == original.encode(line).ids


def test_byte_level_pairs(tmp_path: Path) -> None:
    original = make("qwen35")
    frame(original, "<|begin|> $A <|end|>")
    config = {"bos_token": {"content": "<|begin|>"}, "pad_token": "<|end|>", "chat_template": "old"}
    generation = {"eos_token_id": [1, 5], "bos_token_id": 7}
    save(tmp_path, original, tokenizer_config=config, generation_config=generation)
    (tmp_path / "chat_template.jinja").write_text("new")
    pairs = read_tokenizer(tmp_path, 410)
    tokens, types = pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.token_type"]
    assert tokens[400:405] == ["<think>", "   ", "<pre>", "<pre>x", "[PAD404]"]
    assert types[:3] == [3, 3, 1] and types[400:] == [4, 4, 3, 4] + [5] * 6
    named = {key.split(".")[-1]: id for key, id in pairs.items() if key.endswith("_id")}
    assert named == {"bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 1, "eot_token_id": 5}
    ours = Tokenizer.from_metadata(pairs, HERE)
    assert (ours.bos_id, ours.eos_id, ours.add_bos, ours.add_eos) == (0, 1, True, True)
    assert (ours.eog_ids, ours.chat_template) == ({1, 5}, "new")
    assert ours.encode("a") == original.encode("a").ids == [0, original.token_to_id("a"), 1]
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "a"}, {"name": "tool use!", "template": "b"}]
    config["chat_template"] = named
    pairs = read_tokenizer(save(tmp_path, tokenizer_config=config), 410)
    chat = [value for key, value in sorted(pairs.items()) if "chat" in key]
    assert chat == ["a", "b", ["tooluse"]]
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    assert read_tokenizer(tmp_path, 410)["tokenizer.chat_template"] == "a"
    del config["chat_template"]
    pairs = read_tokenizer(save(tmp_path, tokenizer_config=config), 410)
    assert pairs["tokenizer.chat_template"] == "of a processor"


def test_merges_as_strings_and_as_pairs(tmp_path: Path) -> None:
    folder = save(tmp_path, make())
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    assert isinstance(document["model"]["merges"][0], list)
    strings = [" ".join(pair) for pair in document["model"]["merges"]]
    assert read_tokenizer(folder, 404)["tokenizer.ggml.merges"] == strings
    document["model"]["merges"] = strings
    assert read_tokenizer(save(folder, tokenizer=document), 404)["tokenizer.ggml.merges"] == strings
    document["model"] |= {"vocab": {"q": 0, " ": 1, "q ": 2}, "merges": [["q", " "]]}
    document["added_tokens"] = []
    with pytest.raises(UnsupportedModel, match="makes no known token"):
        read_tokenizer(save(folder, tokenizer=document), 404)


def test_sentencepiece_is_rebuilt(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    save(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    original = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    ours = Tokenizer.from_metadata(read_tokenizer(tmp_path, 410), HERE)
    for line in (line for line in LINES if "<think>" not in line):
        ids = original.encode(line)
        assert ours.encode(line, add_special=False, parse_special=False) == ids
        assert ours.decode(ids) == original.decode(ids)
    assert (ours.bos_id, ours.eos_id, ours.eog_ids, ours.add_bos) == (1, 2, {2}, True)
    assert ours.piece(original.piece_to_id("<0x0A>")) == b"\n"
    assert ours.decode([1, *ours.encode("x", add_special=False), 2, 405]) == "x"
    # Special tokens are cut out, and only a text's very start gets a space in front.
    bare = spm.parse(sentencepiece_model(), HERE)
    bare.add_dummy_prefix = False
    rest = sentencepiece.SentencePieceProcessor(model_proto=spm.serialise(bare)).encode
    think, inst = original.piece_to_id("<think>"), original.piece_to_id("[INST]")
    expected = [1, *original.encode("a"), inst, *rest(" b"), think, *rest("c")]
    assert ours.encode("a[INST] b<think>c") == expected
    assert ours.encode("[INST]a") == [1, inst, *rest("a")]


def test_other_sentencepiece_models_are_refused(tmp_path: Path) -> None:
    for setting, value in {
        "model_type": spm.UNIGRAM, "precompiled_charsmap": b"x", "escape_whitespaces": False,
        "denormalizer_charsmap": b"x", "treat_whitespace_as_suffix": True,
    }.items():  # fmt: skip
        model = spm.parse(sentencepiece_model(), HERE)
        setattr(model, setting, value)
        (tmp_path / "tokenizer.model").write_bytes(spm.serialise(model))
        with pytest.raises(UnsupportedModel, match="cannot be converted"):
            read_tokenizer(tmp_path, 410)


def adding(text: str, **flags: bool) -> Callable[[tokenizers.Tokenizer], Any]:
    return lambda tokenizer: tokenizer.add_tokens([AddedToken(text, **flags)])


REFUSED: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "two BOS": (lambda t: frame(t, "<|begin|> <|begin|> $A"), {}, "in front of"),
    "other BOS": (lambda t: frame(t, "<|end|> $A"), {"bos_token": "<|begin|>"}, "in front of"),
    "rstrip": (adding("<x>", rstrip=True, normalized=False), {}, '"rstrip"'),
    "normalised": (adding("<e\u0301>", normalized=True), {}, "normalisation"),
    "combining": (adding("\u0301>", normalized=True), {}, "normalisation"),
    "misread": (adding("Ġx", normalized=False), {}, "written as ' x'"),
    "decoder": (lambda t: setattr(t, "decoder", decoders.Fuse()), {}, "decoder other than"),
    "too many": (lambda t: t.add_tokens([f"{i} x" for i in range(20)]), {}, "410 rows"),
    "moved": (print, {"added_tokens_decoder": {"9": {"content": "<x>"}}}, "does not"),
    "far EOS": (print, {}, "eos_token_id is 999"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_say_is_refused(case: str, tmp_path: Path) -> None:
    spoil, config, what = REFUSED[case]
    spoil(tokenizer := make())
    eos = {"eos_token_id": 999} if case == "far EOS" else {}
    with pytest.raises(KeelbackError, match=what):
        read_tokenizer(save(tmp_path, tokenizer, tokenizer_config=config, config=eos), 410)


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path, 10) == {"tokenizer.ggml.model": "none"}
    ours = Tokenizer.from_metadata({"tokenizer.ggml.model": "none"}, HERE)
    assert ours.encode("7 1, 30\n2") == [7, 1, 30, 2] and ours.decode([7, 1]) == "7 1 "
    for text in ("x", "1 -2", "1.5", "9" * 10):
        with pytest.raises(InvalidInput, match=r"model\.gguf holds no tokenizer"):
            ours.encode(text)
    for name, content in (("vocab", "{}"), ("tokenizer", "{"), ("tokenizer_config", "[]")):
        (tmp_path / f"{name}.json").write_text(content)
        with pytest.raises((InvalidFile, UnsupportedModel), match=rf"{name}\.json"):
            read_tokenizer(tmp_path, 10)


def load(**changes: Any) -> Tokenizer:
    """A vocabulary of two letters, one merge and three added tokens, with other keys as given."""
    pairs = {
        "model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab", "<s>", "<|im_end|>", "é"],
        "token_type": np.array([1, 1, 1, 3, 3, 4], np.int32), "merges": ["a b"], **changes,
    }  # fmt: skip
    given = {f"tokenizer.ggml.{key}": value for key, value in pairs.items() if value is not None}
    return Tokenizer.from_metadata(given, HERE)


def test_small_metadata() -> None:
    ours = load(bos_token_id=3)
    assert ours.encode("abb<s>éa") == [2, 1, 3, 5, 0]
    assert ours.decode([2, 3, 5]) == "abé" and ours.decode([2, 3], skip_special=False) == "ab<s>"
    assert (ours.bos_id, ours.eos_id, ours.eog_ids, ours.vocab_size) == (3, None, {4}, 6)
    assert not ours.add_bos and ours.chat_template is None
    for call in (lambda: ours.encode("\ud800"), lambda: ours.piece(6), lambda: ours.decode([-1])):
        with pytest.raises(InvalidInput, match=r"surrogate|0 to 5"):
            call()
    for key in ("model", "pre"):
        with pytest.raises(UnsupportedModel, match=rf"tokenizer\.ggml\.{key} is 'klingon'"):
            load(**{key: "klingon"})
    for key in ("normalizer", "prepend_scheme"):
        spoilt = {key: "klingon", "model": "llama" if key == "prepend_scheme" else "gpt2"}
        with pytest.raises(UnsupportedModel, match=rf"tokenizer\.ggml\.{key} is 'klingon'"):
            load(**spoilt, scores=np.zeros(6))
    with pytest.warns(UserWarning, match="does not name its pre-tokenizer"):
        assert load(pre=None).encode("ab") == [2]


@pytest.mark.parametrize("parts", [0, 1 << 40])
@pytest.mark.parametrize("ignores", [False, True])
def test_special_tokens_that_merges_name_are_reached_by_plain_text(monkeypatch, parts, ignores):
    monkeypatch.setattr(byte_level, "_FEW_PARTS", parts)
    tokens, types = ["a", "b", "ab", "abb", "c"], np.array([1, 1, 3, 3, 3], np.int32)
    ours = load(tokens=tokens, token_type=types, merges=["a b"], ignore_merges=ignores)
    assert ours.encode("abb cab", parse_special=False) == [2, 1, 2]


def test_a_short_text_reads_but_a_part_of_the_vocabulary(monkeypatch) -> None:
    whole = property(lambda self: pytest.fail("read whole"))
    monkeypatch.setattr(byte_level._Vocabulary, "whole", whole)
    ours = load()
    assert ours.encode("ab b") == [2, 1]
    with pytest.raises(pytest.fail.Exception, match="read whole"):
        ours.encode("ab " * byte_level._FEW_PARTS)


def test_ordinary_pieces_are_no_ends() -> None:
    tokens = [*"abcdefghijk", ",", "</s>", "<|endoftext|>"]
    types = np.array([1] * 13 + [4], np.int32)
    ours = load(tokens=tokens, token_type=types, merges=[])
    assert (ours.bos_id, ours.eos_id, ours.eog_ids) == (None, None, {13})
    assert ours.decode([12, 13]) == "</s>"  # the end is a control token now
    # A key may name it, as old files do whose tokens are all ordinary.
    ours = load(tokens=tokens, token_type=types, merges=[], eos_token_id=12)
    assert ours.encode("</s>a") == [12, 0]
    types[11] = 3
    assert load(tokens=tokens, token_type=types, merges=[]).eos_id == 11


HOSTILE: dict[str, Mapping[str, Any]] = {
    "model": {"model": 3}, "tokens": {"tokens": []}, "tokens twice": {"tokens": ["a"] * 6},
    "tokens of numbers": {"tokens": np.arange(6)}, "no tokens": {"tokens": None},
    "token_type": {"token_type": np.array([1, 2])}, "token_type 9": {"token_type": np.full(6, 9)},
    "merges unknown": {"merges": ["b a"]}, "merges single": {"merges": ["ab"]},
    "merges triple": {"merges": ["a b b"]}, "no merges": {"merges": None},
    "bos_token_id": {"bos_token_id": 6}, "eos_token_id": {"eos_token_id": "x"},
    "add_bos_token": {"add_bos_token": True}, "eot_token_id": {"eot_token_id": -1},
    "add_eos_token": {"add_eos_token": 1}, "tokens surrogate": {"tokens": ["\ud800", *"bcdef"]},
    "tokens long": {"tokens": ["x" * 9000, *"bcdef"]}, "ignore_merges": {"ignore_merges": 1},
    "merges many": {"merges": ["a b"] * ((1 << 21) + 1)},
    "token_type ragged": {"token_type": [[1], [1, 2]]},
    "token_type special": {
        "tokens": [str(token) for token in range(70_000)], "token_type": np.full(70_000, 4),
        "merges": [],
    },
}  # fmt: skip
SPM_HOSTILE: dict[str, Mapping[str, Any]] = {
    "scores": {"scores": np.zeros(3)}, "scores nan": {"scores": np.full(6, np.nan)},
    "scores large": {"scores": np.full(6, 1e308)},
    "no scores": {"scores": None}, "no token_type": {"token_type": None},
    "token_type bytes": {"token_type": np.array([2, 6, 1, 3, 3, 4])},
    "unknown_token_id": {"unknown_token_id": 99},
}  # fmt: skip


@pytest.mark.parametrize("case", [*HOSTILE, *SPM_HOSTILE])
def test_hostile_metadata(case: str) -> None:
    changes = HOSTILE.get(case) or {"model": "llama", "scores": np.zeros(6), **SPM_HOSTILE[case]}
    key = next(word for word in case.split() if word not in ("no", "of"))
    with pytest.raises(InvalidFile, match=rf"model\.gguf: tokenizer\.ggml\.{key}"):
        load(**changes)


@pytest.mark.parametrize("file", ["models/demo.gguf", "tests/data/mamba-tiny-lit-q8_0.gguf"])
def test_sample_of_the_files_in_the_repository(file: str) -> None:
    """Ids that `sentencepiece` and `tokenizers` gave with the checkpoints' own files."""
    path = PACKAGE / file
    ours = Tokenizer.from_metadata(GGUF(path).metadata, path)
    sample = json.loads((PACKAGE / "tests/data/tokenizer_sample.json").read_text("utf-8"))
    for line, ids in zip(sample["lines"], sample[file], strict=True):
        assert ours.encode(line, parse_special=False) == ids
        assert ours.decode(ids) == line


def test_a_checkpoints_files_are_its_own_and_of_a_size(tmp_path: Path, monkeypatch):
    """A link as chat template would put what it leads to into a file that is passed on."""
    secret, folder = tmp_path / "id_rsa", tmp_path / "checkpoint"
    secret.write_text("a key")
    folder.mkdir()
    template, config = folder / "chat_template.jinja", folder / "config.json"
    settings = Settings(folder, folder)
    template.symlink_to(secret)
    with pytest.raises(InvalidFile, match=r"chat_template\.jinja is a link out of the checkpoint"):
        settings.chat_templates()
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "2").write_text("own")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/2")
    own = Settings(snapshot, snapshot).chat_templates()
    assert own == {"tokenizer.chat_template": "own"}
    config.symlink_to("/dev/zero")
    with pytest.raises(InvalidFile, match="no ordinary file"):
        Settings(folder, folder)
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(InvalidFile, match="no ordinary file"):
        Settings(folder, folder)
    config.unlink()
    config.write_text("{}" + " " * 99)
    monkeypatch.setattr(convert_config, "_LARGEST_FILE", 100)
    with pytest.raises(InvalidFile, match="larger than"):
        Settings(folder, folder)


def test_a_pattern_that_takes_for_ever_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pretokenizers, "_PATIENCE", 0.2)
    slow = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    slow.pre_tokenizer = regex("(?:" + "(?:(?=.)|(?=.))" * 18 + ")(?!)")
    slow.decoder = decoders.ByteLevel()
    slow.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="take too long"):
        read_tokenizer(tmp_path, 1)
    slow.pre_tokenizer = regex(r"(\s|\w|.)*(\s|\w|.)*x")
    slow.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(pretokenizers, "_PATIENCE", 60.0)
    with pytest.raises(UnsupportedModel, match="it is not run"):
        read_tokenizer(tmp_path, 1)
