"""The forms a tokenizer comes in beside tokenizer.json and tokenizer.model, and hostile ones."""

from __future__ import annotations

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken

from keelback.convert.ranks import last_merges
from keelback.convert.regexes import why_not
from keelback.convert.tokenizer import read_tokenizer
from keelback.engine import splitters
from keelback.engine.tokenizer import Tokenizer
from keelback.kernels.errors import InvalidFile, InvalidInput, KeelbackError, UnsupportedModel
from keelback.kernels.formats import pretokenizers, spm
from vocabularies import (
    HERE,
    LINES,
    frame,
    make,
    metaspace,
    ranks,
    save,
    sentencepiece_model,
    tekken,
    tiktoken_file,
)


def merge_by_rank(ranks: dict[bytes, int], text: bytes) -> list[int]:
    """Ids of a word as tiktoken finds them: whole, or by the lowest rank again and again."""
    if text in ranks:
        return [ranks[text]]
    parts = [text[at : at + 1] for at in range(len(text))]
    while True:
        joined = [ranks.get(a + b, 1 << 30) for a, b in pairwise(parts)]
        if not joined or min(joined) == 1 << 30:
            return [ranks[part] for part in parts]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def expected(stored: dict[bytes, int], pre: str, text: str) -> list[int]:
    row = pretokenizers.TABLE[pre]
    normalizer, pre_tokenizer = pretokenizers.build(row)
    text = normalizer.normalize_str(text) if normalizer else text
    spans = [span for _, span in pre_tokenizer.pre_tokenize_str(text)]
    return [rank for a, b in spans for rank in merge_by_rank(stored, text[a:b].encode())]


@pytest.mark.parametrize(
    ("name", "pre"), [("tiktoken.model", "kimi-k2"), ("qwen.tiktoken", "qwen2")]
)
def test_tiktoken_files(name: str, pre: str, tmp_path: Path) -> None:
    stored = ranks()
    stored[b"mos"] = len(stored)  # of which no merge makes anything
    assert b"mos" not in last_merges(stored)
    (tmp_path / name).write_bytes(tiktoken_file(stored))
    config = {"eos_token": "[EOS]", "add_bos_token": False}
    if pre == "kimi-k2":
        config["added_tokens_decoder"] = {"302": {"content": "[EOS]", "special": True}}
    said: list[str] = []
    pairs = read_tokenizer(save(tmp_path, tokenizer_config=config), 520, said.append)
    tokens, types = pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.token_type"]
    ours = Tokenizer.from_metadata(pairs, HERE)
    assert pairs["tokenizer.ggml.pre"] == pre and pairs["tokenizer.ggml.ignore_merges"]
    assert "llama.cpp" in said[0] and len(said) == 1
    if pre == "kimi-k2":
        assert tokens[301:303] == ["<|reserved_token_301|>", "[EOS]"] and types[301:303] == [3, 3]
        assert (ours.eos_id, tokens[519]) == (302, "<|reserved_token_519|>")
    else:
        assert tokens[301:305] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>"]
        assert (tokens[509], types[508:510]) == ("[PAD509]", [3, 5])
    for line in [*LINES, "mosmos mos", "漢字ABCかな"]:
        ids = expected(stored, pre, line)
        assert ours.encode(line, parse_special=False) == ids
        assert ours.decode(ids) == b"".join(list(stored)[n] for n in ids).decode()


def test_a_program_beside_ranks_must_have_the_known_pattern(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_bytes(tiktoken_file(ranks()))
    program = tmp_path / "tokenization_kimi.py"
    program.write_text('raise SystemExit; pat_str = r"[\\p{Han}]+"')
    assert read_tokenizer(tmp_path, 400)["tokenizer.ggml.pre"] == "kimi-k2"
    program.write_text("pat_str = r'.'")
    with pytest.raises(UnsupportedModel, match=r"tokenization_kimi\.py splits text otherwise"):
        read_tokenizer(tmp_path, 400)


def test_tekken_files(tmp_path: Path) -> None:
    stored = dict(list(ranks().items())[:290])
    pairs = read_tokenizer(save(tmp_path, tekken=tekken(ranks())), 330)
    assert pairs["tokenizer.ggml.tokens"][3:5] == ["[INST]", "[/INST]"]
    assert pairs["tokenizer.ggml.tokens"][29] == "<SPECIAL_29>"
    ours = Tokenizer.from_metadata(pairs, HERE)
    assert (ours.bos_id, ours.eos_id, ours.add_bos, ours.add_eos) == (1, 2, True, False)
    for line in LINES:
        ids = [rank + 30 for rank in expected(stored, "tekken", line)]
        assert ours.encode(line, parse_special=False) == [1, *ids]
    listed = [{"token_str": text, "is_control": text != "<b>"} for text in ("<unk>", "<s>", "<b>")]
    pairs = read_tokenizer(save(tmp_path, tekken=tekken(ranks()) | {"special_tokens": listed}), 330)
    assert pairs["tokenizer.ggml.token_type"][:4] == [3, 3, 4, 3]
    ranked = [{**entry, "rank": place} for place, entry in enumerate(listed)]
    document = tekken(ranks()) | {"special_tokens": ranked}
    assert read_tokenizer(save(tmp_path, tekken=document), 330) == pairs
    ranked.reverse()
    with pytest.raises(InvalidFile, match="out of order"):
        read_tokenizer(save(tmp_path, tekken=document), 330)
    for spoilt in (
        {"pattern": "."},
        {"default_vocab_size": 900},
        {"default_num_special_tokens": 3},
    ):
        with pytest.raises(UnsupportedModel, match=r"tekken\.json"):
            read_tokenizer(save(tmp_path, tekken=tekken(ranks(), **spoilt)), 330)


@pytest.mark.parametrize(
    ("name", "pre"), [("GPT2Tokenizer", "gpt-2"), ("GPTNeoXTokenizerFast", "olmo")]
)
def test_vocab_and_merges(name: str, pre: str, tmp_path: Path) -> None:
    original = make(pre)
    document = json.loads(original.to_str())
    vocabulary, merges = (document["model"][key] for key in ("vocab", "merges"))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines), "utf-8")
    added = {str(entry["id"]): entry for entry in document["added_tokens"]}
    config = {"tokenizer_class": name, "added_tokens_decoder": added, "bos_token": "<|begin|>"}
    pairs = read_tokenizer(save(tmp_path, vocab=vocabulary, tokenizer_config=config), 410)
    assert pairs == read_tokenizer(save(tmp_path, original), 410) | {"tokenizer.ggml.pre": pre}
    (tmp_path / "tokenizer.json").unlink()
    config["add_bos_token"] = True
    pairs = read_tokenizer(save(tmp_path, tokenizer_config=config), 410)
    assert Tokenizer.from_metadata(pairs, HERE).encode("a")[0] == 0
    for spoilt in ({"tokenizer_class": "BartTokenizer"}, {"add_prefix_space": True}):
        with pytest.raises(UnsupportedModel, match=r"vocab\.json says too little"):
            read_tokenizer(save(tmp_path, tokenizer_config=config | spoilt), 410)


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_from_merges(legacy: bool, tmp_path: Path) -> None:
    (source := tmp_path / "original").write_bytes(sentencepiece_model())
    model = spm.parse(sentencepiece_model(), source)
    (folder := tmp_path / "json").mkdir()
    original = metaspace(source, legacy)
    pairs = read_tokenizer(save(folder, original), 390)
    assert pairs.get("tokenizer.ggml.prepend_scheme") == (None if legacy else "metaspace-first")
    ours = Tokenizer.from_metadata(pairs, HERE)
    for line in [*LINES, "a[INST]b[INST] c", " d", "▁e"]:
        ids = original.encode(line).ids
        assert ours.encode(line) == ids
        assert ours.decode(ids) == original.decode(ids)
    assert (ours.bos_id, ours.add_bos, ours.add_eos) == (1, True, False)
    document = json.loads(original.to_str())
    with pytest.raises(InvalidFile, match="no unknown token"):
        read_tokenizer(save(folder, tokenizer=spoil(document, "model", "unk_token", value={})), 390)
    for spoil_it in (
        lambda d: d["model"]["merges"].append(["a", "x"]),
        lambda d: d["model"]["merges"].pop(),
        lambda d: d["model"]["merges"].append(d["model"]["merges"][0]),
        lambda d: d["decoder"]["decoders"].pop(),
        lambda d: d.update(normalizer={"type": "Lowercase"}),
        lambda d: d.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "split": True}),
        lambda d: d["model"].update(fuse_unk=False),
    ):  # fmt: skip
        spoil_it(spoilt := json.loads(json.dumps(document)))
        with pytest.raises(KeelbackError, match=r"put the tokenizer\.model it was made"):
            read_tokenizer(save(folder, tokenizer=spoilt), 390)
        shutil.copy(source, folder / "tokenizer.model")  # with the model it is not needed
        assert read_tokenizer(folder, 390)["tokenizer.ggml.scores"][7] == model.pieces[7].score
        (folder / "tokenizer.model").unlink()


def test_the_space_in_front_of_later_segments(tmp_path: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    inst, a, space_a = (theirs.piece_to_id(piece) for piece in ("[INST]", "a", "▁a"))
    (tmp_path / "tokenizer.model.v3").write_bytes(b"older")
    (tmp_path / "tokenizer.model.v11m1").write_bytes(sentencepiece_model())
    cases = [({}, space_a), ({"legacy": True}, space_a), ({"legacy": False}, a)]
    for config, behind in cases:
        if config:
            save(tmp_path, tokenizer_config=config)
        ours = Tokenizer.from_metadata(read_tokenizer(tmp_path, 390), HERE)
        assert ours.encode("a[INST]a", False) == [space_a, inst, behind]


def test_spaces_beside_special_tokens_are_said_and_beside_others_refused(tmp_path: Path) -> None:
    original = make()
    original.add_special_tokens([AddedToken("[MASK]", lstrip=True, normalized=False)])
    said: list[str] = []
    pairs = read_tokenizer(save(tmp_path, original), 410, said.append)
    assert len(said) == 1 and "[MASK]" in said[0]
    ours = Tokenizer.from_metadata(pairs, HERE)
    assert ours.encode("a [MASK]")[-1] == original.token_to_id("[MASK]")
    original.add_tokens([AddedToken("<x>", single_word=True, normalized=False)])
    with pytest.raises(UnsupportedModel, match=r'<x>.*"single_word"'):
        read_tokenizer(save(tmp_path, original), 410)


def test_flags_of_tokenizer_config_win_over_the_template(tmp_path: Path) -> None:
    frame(original := make(), "<|begin|> $A <|end|>")
    config: dict[str, Any] = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    for flags, adds in (
        ({}, (True, True)), ({"add_bos_token": True}, (True, False)),
        ({"add_bos_token": False, "add_eos_token": True}, (False, True)),
    ):  # fmt: skip
        pairs = read_tokenizer(save(tmp_path, original, tokenizer_config=config | flags), 410)
        ours = Tokenizer.from_metadata(pairs, HERE)
        assert (ours.add_bos, ours.add_eos) == adds


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    (checkpoint := tmp_path / "checkpoint").mkdir()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    save(checkpoint, generation_config={"eos_token_id": 1})
    save(elsewhere, make(), config={"bos_token_id": 3}, tokenizer_config={"pad_token": "<|end|>"})
    assert read_tokenizer(checkpoint, 410)["tokenizer.ggml.model"] == "none"
    for place in (elsewhere, elsewhere / "tokenizer.json"):
        pairs = read_tokenizer(checkpoint, 410, tokenizer=place)
        assert pairs["tokenizer.ggml.padding_token_id"] == 1 == pairs["tokenizer.ggml.eos_token_id"]
        assert "tokenizer.ggml.bos_token_id" not in pairs and pairs["tokenizer.ggml.pre"] == "olmo"
    nothing = [elsewhere / name for name in ("nothing.json", "nothing.txt", "x" * 300)]
    for place in (checkpoint, *nothing):
        with pytest.raises((InvalidInput, InvalidFile), match=place.name):
            read_tokenizer(checkpoint, 410, tokenizer=place)
    with pytest.raises(InvalidInput, match="there is no such tokenizer"):
        read_tokenizer(checkpoint, 410, tokenizer=elsewhere / "nothing")


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_the_ends_of_a_wrapped_model_are_its_own(key: str, tmp_path: Path) -> None:
    config = {"eos_token_id": 5, "pad_token_id": 6, key: {"eos_token_id": 7}}
    pairs = read_tokenizer(save(tmp_path, config=config), 410)
    assert pairs["tokenizer.ggml.eos_token_id"] == 7
    assert pairs["tokenizer.ggml.padding_token_id"] == 6


def test_a_wrong_id_is_looked_for_in_the_checkpoint(tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    save(elsewhere, make())
    save(tmp_path, config={"eos_token_id": 1000})
    with pytest.raises(UnsupportedModel, match=f"{tmp_path}: eos_token_id is 1000"):
        read_tokenizer(tmp_path, 410, tokenizer=elsewhere)


HOSTILE_PATTERNS = (
    "(a+)+$", ".*.*.*.*x", "(?:(?:a{500}){500}){500}", r"(a)\1", "a?" * 20 + "a" * 20, "(", "[a",
    "(?<n>a)", r"\g<0>", "a{0,9}" * 6, "(?~a)", "a{1000}", "a{5}{5}", "a+*", "a{2}+", "x" * 3000,
    "a{99999999999999999999}", "|" * 100, "(?x)a", ")a(",
)  # fmt: skip


def test_patterns_of_strangers_are_not_run(tmp_path: Path) -> None:
    for row in pretokenizers.TABLE.values():
        assert not any(map(why_not, row.patterns))
    assert all(map(why_not, HOSTILE_PATTERNS))
    document = json.loads(make().to_str())
    for pattern in HOSTILE_PATTERNS:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split]}
        with pytest.raises(UnsupportedModel, match="it is not run"):
            read_tokenizer(save(tmp_path, tokenizer=document), 410)


def spoil(document: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    node = document = json.loads(json.dumps(document))
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return document


def test_hostile_json(tmp_path: Path) -> None:
    frame(original := make(), "<|begin|> $A <|end|>")
    document = json.loads(original.to_str())
    for path, value in (
        (("model",), None), (("model", "type"), "Unigram"), (("model", "vocab"), []),
        (("model", "vocab", "a"), 1 << 40), (("model", "vocab", "a"), "1"),
        (("model", "vocab", "x" * 9000), 409), (("model", "vocab", "\ud800"), 409),
        (("model", "merges"), 3), (("model", "merges", 0), ["a"]),
        (("model", "merges", 0), "a q z"),
        (("model", "merges", 0), ["a", "nothing"]), (("added_tokens", 0, "id"), -1),
        (("model", "continuing_subword_prefix"), "##"), (("added_tokens",), [3]),
        (("normalizer",), {"type": "Precompiled"}), (("normalizer",), "NFC"),
        (("post_processor", "special_tokens"), {}), (("pre_tokenizer",), {"type": "Punctuation"}),
        (("decoder",), {"type": "Nothing"}), (("pre_tokenizer",), None),
    ):  # fmt: skip
        folder = save(tmp_path, tokenizer=spoil(document, *path, value=value))
        with pytest.raises((InvalidFile, UnsupportedModel), match=r"tokenizer\.json"):
            read_tokenizer(folder, 410)
    nested = '{"type":"Sequence","normalizers":[' * 400 + "]}" * 400
    text = json.dumps(spoil(document, "normalizer", value="@")).replace('"@"', nested)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(KeelbackError, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path, 410)


@pytest.mark.parametrize("name", ["tiktoken.model", "tekken.json", "merges.txt"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    """Whatever is cut or changed in them: a sentence, or a vocabulary."""
    original = make("gpt-2")
    model = json.loads(original.to_str())["model"]
    config = {"tokenizer_class": "GPT2Tokenizer"}
    whole = {
        "tiktoken.model": tiktoken_file(ranks()),
        "tekken.json": json.dumps(tekken(ranks())).encode(),
        "merges.txt": "\n".join(" ".join(merge) for merge in model["merges"]).encode(),
    }[name]
    if name == "merges.txt":
        save(tmp_path, vocab=model["vocab"], tokenizer_config=config)
    draw, refused = random.Random(name), 0
    for _ in range(60):
        spoilt = bytearray(whole[: draw.choice((len(whole), draw.randrange(len(whole))))])
        for _ in range(draw.randrange(4) if spoilt else 0):
            spoilt[draw.randrange(len(spoilt))] = draw.randrange(256)
        (tmp_path / name).write_bytes(spoilt)
        try:
            Tokenizer.from_metadata(read_tokenizer(tmp_path, 600), HERE).encode("a b")
        except KeelbackError:
            refused += 1
    assert refused > 10


def test_ranks_that_would_take_a_day_to_merge_are_refused(tmp_path: Path) -> None:
    long = {b"a" * length: length for length in range(7000, 7100)}
    (tmp_path / "tiktoken.model").write_bytes(tiktoken_file(ranks() | long))
    with pytest.raises(InvalidFile, match="more long tokens than any vocabulary"):
        read_tokenizer(tmp_path, 8000)


def test_merges_of_sentencepiece_are_not_looked_for_in_pieces_without_end(tmp_path: Path) -> None:
    (source := tmp_path / "original").write_bytes(sentencepiece_model())
    document = json.loads(metaspace(source, legacy=False).to_str())
    vocabulary = document["model"]["vocab"]
    for length in range(7000, 7100):
        vocabulary["a" * length] = len(vocabulary)
    with pytest.raises(InvalidFile, match="more long tokens than any vocabulary"):
        read_tokenizer(save(tmp_path, tokenizer=document), 500)


def test_a_run_too_long_for_a_pattern_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitters, "_LONGEST_RUN", 100)
    pairs = {"model": "gpt2", "pre": "qwen2", "tokens": list(pretokenizers.BYTES), "merges": []}
    ours = Tokenizer.from_metadata({f"tokenizer.ggml.{k}": v for k, v in pairs.items()}, HERE)
    assert len(ours.encode("ab " * 100)) == 300
    for letter in " a":
        with pytest.raises(InvalidInput, match="in a row"):
            ours.encode("x " + letter * 101)
