"""Two thousand lines of mixed text through real vocabularies, against the checkpoints' tokenizers.

Shared checkpoints are found under KEELBACK_SHARED, other vocabularies under KEELBACK_TOKENIZERS:
20B_tokenizer.json, qwen3_6.tiktoken, tokenizer.model.v1, *.model.v3. What is not there is skipped.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models

from keelback.convert.tokenizer import read_tokenizer
from keelback.engine.tokenizer import Tokenizer
from keelback.kernels.formats import pretokenizers

LINES = 2000
SHARED = os.environ.get("KEELBACK_SHARED")
VOCABULARIES = os.environ.get("KEELBACK_TOKENIZERS")

WORDS = [
    "the", "and", "of", "state", "memory", "snake", "keelback", "stream", "delta", "Mamba", "It's",
    "they'll", "WE'VE", "can't", "naïve", "café", "Straße", "résumé", "coöperate", "DeltaNet",
    "tokenizer", "iPhone", "HTTPServer", "unbelievably", "x86_64", "3.14159",
]  # fmt: skip
FRAGMENTS = {
    "code": (
        "def f(x):\n\treturn x**2 + y[0]", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
        "</div>", "SELECT * FROM t WHERE a<>'b';", "x = {'a': 1, \"b\": [2, 3]}  # y",
        "#include <stdio.h>\r\n", "$PATH:/usr/bin", "\\begin{align}\\frac{1}{2}\\end{align}",
        "https://example.org/a?b=c&d=%20#e",
    ),
    "scripts": (
        "日本語のテキスト", "中文字符", "한국어 텍스트", "Привет, мир!", "Ελληνικά", "العربية",
        "עִבְרִית", "हिन्दी में", "ภาษาไทย", "Tiếng Việt", "ქართული",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ﬁﬂ Ⅷ ½ ²", "ǅungla",
    ),
    "emoji": ("😀", "👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪", "❤️", "1️⃣", "🧑🏿‍🚀", "\u200d", "\ufe0f"),
    "marks": (
        "e\u0301", "o\u0302\u0323", "\u1100\u1161\u11a8", "\u212b", "\u037e", "q\u0307\u0323",
        "\u0301", "x\u0338", ">\u0338", "\u0958", "Z\u0351\u036f\u0333\u0310", "\uac00\u11a8",
    ),
    "controls": (
        "\0", "\x01", "\x1b[31m", "\x7f", "\x85", "\u2028", "\ufeff", "\u200b", "\ufffd", "\x0b",
    ),
    "spaces": (
        " ", "  ", "   ", " " * 7, " " * 25, "\t", "\t\t", "\n", "\n\n\n", " \n ", "\r\n", "\u00a0",
        "\u3000", " \t \n", "\u2003\u2009",
    ),
    "special": (
        "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "[INST]",
        "[/INST]", "<0x0A>", "▁", "▁▁the", "[PAD7]", "<|padding|>", "<|", "|>", "<|endof", "Ġ", "Ċ",
    ),
}  # fmt: skip


@cache
def lines() -> tuple[str, ...]:
    """The texts: every kind of fragment mixed with words, digits and random characters."""
    draw = random.Random(20261121)
    prose = WORDS
    if SHARED:
        text = (Path(SHARED) / "corpus" / "valid.txt").read_text("utf-8")
        prose = [*WORDS, *text.splitlines()[:3000]]

    def fragment() -> str:
        kind = draw.choice(["word", "word", "digits", "random", *FRAGMENTS])
        if kind == "word":
            return draw.choice(prose)
        if kind == "digits":
            return str(draw.randrange(10 ** draw.randrange(1, 9)))
        if kind == "random":
            codes = (
                draw.choice((0x7F, 0x2FF, 0xD7FF, 0x1FAFF)) for _ in range(draw.randrange(1, 6))
            )
            return "".join(chr(draw.randrange(top + 1)) for top in codes)
        return draw.choice(FRAGMENTS[kind])

    def line() -> str:
        parts = (fragment() + draw.choice(("", "", " ")) for _ in range(draw.randrange(1, 12)))
        text = "".join(parts)
        return "".join(c for c in text if not 0xD800 <= ord(c) < 0xE000)

    return tuple(line() for _ in range(LINES))


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
    many = expected + random_ids(reference.get_vocab_size())
    for skip in (True, False):
        expected = [reference.decode(ids, skip_special_tokens=skip) for ids in many]
        assert_alike(expected, [ours.decode(ids, skip_special=skip) for ids in many], many)
    assert sum(map(len, many)) > 20 * LINES


def compare_sentencepiece(folder: Path, vocab_size: int) -> None:
    """As above; `sentencepiece` itself does not look for special tokens in a text."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = converted(folder, vocab_size)
    texts = list(lines())
    expected = [reference.encode(text) for text in texts]
    got = [ours.encode(text, add_special=False, parse_special=False) for text in texts]
    assert_alike(expected, got, texts)
    assert_alike(
        [reference.decode(ids) for ids in expected], list(map(ours.decode, expected)), texts
    )
    assert list(map(ours.decode, expected)) == [text.replace("▁", " ") for text in texts]
    marker = "<s>"
    for text in texts[:200]:
        pieces = text.replace(marker, "")
        ids = ours.encode(marker + pieces, add_special=False)
        assert ids[0] == ours.bos_id
        assert ours.decode(ids, skip_special=False) == marker + pieces.replace("▁", " ")


@pytest.mark.parametrize("name", ["mamba-tiny-lit", "mamba2-tiny"])
def test_shared_byte_level_checkpoint(name: str) -> None:
    compare_byte_level(require(SHARED, "KEELBACK_SHARED", "checkpoints", name), 2048)


def test_shared_sentencepiece_checkpoint() -> None:
    compare_sentencepiece(require(SHARED, "KEELBACK_SHARED", "checkpoints", "gdn-tiny"), 2048)


@pytest.mark.parametrize("name", ["mamba-tiny-lit", "mamba2-tiny", "gdn-tiny"])
def test_shared_checkpoint_gives_the_reference_ids(name: str) -> None:
    folder = require(SHARED, "KEELBACK_SHARED", "checkpoints", name)
    ours = converted(folder, 2048)
    for prompt in json.loads((folder / "reference.json").read_text("utf-8"))["prompts"]:
        assert ours.encode(prompt["text"]) == prompt["ids"]


def test_gpt_neox(tmp_path: Path) -> None:
    source = require(VOCABULARIES, "KEELBACK_TOKENIZERS", "20B_tokenizer.json")
    shutil.copy(source, tmp_path / "tokenizer.json")
    assert read_tokenizer(tmp_path, 50280)["tokenizer.ggml.pre"] == "olmo"
    compare_byte_level(tmp_path, 50280)


@pytest.mark.parametrize(
    ("pattern", "vocab_size"), [("tokenizer.model.v1", 32000), ("*.model.v3", 32768)]
)
def test_mistral_sentencepiece(tmp_path: Path, pattern: str, vocab_size: int) -> None:
    folder = require(VOCABULARIES, "KEELBACK_TOKENIZERS")
    sources = list(folder.glob(pattern))
    if not sources:
        pytest.skip(f"{folder / pattern} is not there")
    shutil.copy(sources[0], tmp_path / "tokenizer.model")
    compare_sentencepiece(tmp_path, vocab_size)


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


def merge_by_rank(ranks: dict[bytes, int], text: bytes, below: int) -> list[bytes]:
    """Pieces of a text after all merges whose result ranks lower than `below`."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while len(parts) > 1:
        joined = [ranks.get(a + b, below) for a, b in itertools.pairwise(parts)]
        best = min(joined)
        if best >= below:
            break
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def qwen_tokenizer(ranks: dict[bytes, int], pairs: list[list[bytes]]) -> tokenizers.Tokenizer:
    """A tokenizers.Tokenizer of Qwen3.5's ranks and its merges in order of rank."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    table = [chr(b) if b in printable else chr(next(others)) for b in range(256)]

    def spell(token: bytes) -> str:
        return "".join(table[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    model = models.BPE(vocabulary, [(spell(a), spell(b)) for a, b in pairs])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = pretokenizers.build(
        pretokenizers.TABLE["qwen35"]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False, special=text.startswith("<|")) for text in QWEN_ADDED]
    )
    return tokenizer


def test_qwen35(tmp_path: Path) -> None:
    source = require(VOCABULARIES, "KEELBACK_TOKENIZERS", "qwen3_6.tiktoken")
    entries = (line.split() for line in source.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in entries}
    last = {rank: merge_by_rank(ranks, text, rank) for text, rank in ranks.items() if len(text) > 1}
    # A few hundred tokens are made of three pieces, and only tiktoken, which asks first whether a
    # whole word is a token, finds them.
    pairs = [pair for pair in last.values() if len(pair) == 2]
    assert len(last) - len(pairs) < 300
    reference = qwen_tokenizer(ranks, pairs)
    reference.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_tokenizer(tmp_path, 248320)["tokenizer.ggml.pre"] == "qwen35"
    compare_byte_level(tmp_path, 248320)

    ours = converted(tmp_path, 248320)
    ends = ("<|endoftext|>", "<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
    assert ours.eog_ids == {reference.token_to_id(text) for text in ends}
    # Against the ranks themselves, without the merges recomputed from them.
    words = 0
    for text in lines()[:500]:
        for word in split_words(reference, text):
            expected = [ranks[part] for part in merge_by_rank(ranks, word, len(ranks))]
            if all(len(last.get(rank, "xx")) == 2 for rank in expected) and is_text(word):
                words += 1
                assert ours.encode(word.decode(), parse_special=False) == expected, word
    assert words > 5000


def split_words(reference: tokenizers.Tokenizer, text: str) -> list[bytes]:
    """What the pre-tokenizer makes of a text, as bytes of it."""
    text = reference.normalizer.normalize_str(text)
    spans = (span for _, span in reference.pre_tokenizer.pre_tokenize_str(text))
    return [text[start:end].encode() for start, end in spans]


def is_text(word: bytes) -> bool:
    """Whether a word stays one piece when it stands alone (a lone space run may not)."""
    return word.decode() == word.decode().strip() and not any(
        text in word.decode() for text in QWEN_ADDED
    )
