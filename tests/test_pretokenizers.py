"""Pre-tokenizers and normalisers are recognised by what they do, or refused."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models
from tokenizers.normalizers import NFC, NFD, NFKC, Lowercase, Replace, Strip
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Sequence

from keelback.convert.tokenizer import read_tokenizer
from keelback.engine.tokenizer import Tokenizer
from keelback.kernels.errors import UnsupportedModel
from keelback.kernels.formats import pretokenizers
from vocabularies import (
    CL100K,
    DIGITS,
    GPT2,
    HERE,
    LINES,
    LLAMA3,
    TEKKEN,
    make,
    regex,
    save,
)


def test_behaviours_are_told_apart() -> None:
    build, pieces = pretokenizers.build, pretokenizers._pieces
    seen = {name: list(pieces(build(row)[1])) for name, row in pretokenizers.TABLE.items()}
    alike = [pair for pair in combinations(seen, 2) if seen[pair[0]] == seen[pair[1]]]
    # These differ in the normaliser or in ignore_merges.
    assert alike == [
        ("gpt-2", "olmo"), ("qwen2", "bailingmoe"), ("llama-bpe", "dbrx"),
        ("starcoder", "command-r"),
    ]  # fmt: skip
    assert set(pretokenizers.ALIASES.values()) <= set(pretokenizers.TABLE)
    assert pretokenizers.find("mpt") is pretokenizers.TABLE["olmo"]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (None, ByteLevel(add_prefix_space=True)), (None, ByteLevel(False, use_regex=False)),
        (None, regex(CL100K % "{1,2}")), (NFC(), regex(CL100K % "{1,2}")),
        (None, regex(LLAMA3.replace("(?i:", "(?:"))),
        (None, regex(LLAMA3.replace("[\\r\\n]*", ""))),
        (None, regex(TEKKEN.replace("[\\r\\n/]", "[\\r\\n]"))),
        (None, regex(TEKKEN.replace(r"\p{M}", ""))), (None, Sequence([GPT2, DIGITS])),
    ],
)  # fmt: skip
def test_an_unknown_splitting_is_refused(normalizer: Any, pre_tokenizer: Any) -> None:
    tokenizer = make()
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    with pytest.raises(UnsupportedModel, match="none of the pre-tokenizers"):
        pretokenizers.recognise(tokenizer)


@pytest.mark.parametrize("normalizer", [NFKC(), NFD(), Lowercase(), Strip(), Replace("ab", "c")])
def test_an_unknown_normaliser_is_refused(normalizer: Any) -> None:
    tokenizer = make()
    for found in (normalizer, Normalizers([NFC(), normalizer])):
        tokenizer.normalizer = found
        with pytest.raises(UnsupportedModel, match="keelback knows NFC"):
            pretokenizers.recognise(tokenizer)
    tokenizer.normalizer = Normalizers([NFC()])
    assert pretokenizers.recognise(tokenizer) == ("olmo", "NFC", False)
    tokenizer.normalizer = Normalizers([])
    assert pretokenizers.recognise(tokenizer) == ("gpt-2", None, False)


OPTIONS = {
    "dropout": 0.1, "fuse_unk": True, "byte_fallback": True, "continuing_subword_prefix": "##",
    "end_of_word_suffix": "</w>", "unk_token": "a",
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options_without_a_key_are_refused(option: str) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0}, [], **{option: OPTIONS[option]}))
    tokenizer.pre_tokenizer = GPT2
    with pytest.raises(UnsupportedModel, match=option):
        pretokenizers.recognise(tokenizer)


def test_a_dead_unknown_token_may_be_named() -> None:
    assert pretokenizers.recognise(make(unknown="<|end|>")).name == "olmo"


@pytest.mark.parametrize(
    ("like", "normalizer", "ignores", "name", "keys"),
    [
        ("qwen2", NFC(), True, "qwen2", {"ignore_merges": True}),
        ("llama-bpe", NFC(), False, "dbrx", {"normalizer": "NFC"}),
        ("tekken", None, False, "tekken", {"ignore_merges": False}),
        ("qwen35", None, False, "qwen35", {"normalizer": "none"}),
    ],
)
def test_what_no_name_stands_for_has_keys_of_its_own(
    like: str, normalizer: Any, ignores: bool, name: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    (original := make(like)).model.ignore_merges = ignores
    original.normalizer = normalizer
    said: list[str] = []
    pairs = read_tokenizer(save(tmp_path, original), 410, said.append)
    assert pairs["tokenizer.ggml.pre"] == name and len(said) == ("ignore_merges" in keys)
    found = {key.split(".")[-1]: pairs[key] for key in pairs if key.endswith(tuple(keys))}
    assert found == keys
    ours = Tokenizer.from_metadata(pairs, HERE)
    for line in LINES:
        assert ours.encode(line, add_special=False) == original.encode(line).ids
