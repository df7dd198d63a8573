"""Vocabularies made on the spot, and the folders and forms that checkpoints keep them in."""

from __future__ import annotations

import base64
import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split

from keelback.kernels.formats import pretokenizers, spm

HERE = Path("model.gguf")
CORPUS = [
    "The state of a recurrent model is all it remembers, and it's never more than that.",
    "They'll say WE'VE 12 12345 snakes; don't you? Yes!!\n\nNo...\r\n\tdef f(x): return x**2",
    "naïve café e\u0301 日本語 中文 한국어 Привет 😀 👩‍👩‍👧  spaces   and\u00a0more \0 \x1b",
    "<think> [INST] </s> <|end|> keelback Keelback KEELBACK camelCase HTTPServer a/b//c ▁ ½ ²",
]
EDGES = ("", " ", "  x", "\n", "x ", "a<pre>xx<pre> <pre>")
LINES = [*CORPUS, *"".join(CORPUS).split(" "), *EDGES, *pretokenizers.probes()[:40]]


def regex(pattern: str) -> Sequence:
    """The usual spelling: a pattern, then bytes."""
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(False, use_regex=False)])


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = CL100K % "{1,3}"
QWEN35 = (CL100K % "").replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2, DIGITS = ByteLevel(add_prefix_space=False), Digits(individual_digits=True)
TRIPLES = Split(Regex("[0-9][0-9][0-9]"), "isolated")
GPT4O = TEKKEN.replace("[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+C|")
GPT4O = GPT4O.replace("[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*C|")
GPT4O = GPT4O.replace("C|", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|").replace(r"\p{N}|", r"\p{N}{1,3}|")
KIMI = r"[\p{Han}]+|" + GPT4O.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]").replace(
    "[\\r\\n/]", "[\\r\\n]"
)
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
# As checkpoints spell them: the normaliser, the pre-tokenizer, ignore_merges.
SPELLINGS: dict[str, tuple[Any, Any, bool]] = {
    "gpt-2": (None, GPT2, False),
    "olmo": (NFC(), GPT2, False),
    "qwen2": (NFC(), regex(CL100K % ""), False),
    "qwen35": (NFC(), regex(QWEN35), False),
    "llama-bpe": (None, regex(LLAMA3), True),
    "dbrx": (None, regex(LLAMA3), False),
    "starcoder": (None, Sequence([DIGITS, GPT2]), False),
    "command-r": (NFC(), Sequence([DIGITS, GPT2]), False),
    "falcon": (None, Sequence([Punctuation("contiguous"), GPT2, TRIPLES]), False),
    "tekken": (None, regex(TEKKEN), True),
    "gpt-4o": (None, regex(GPT4O), False),
    "kimi-k2": (None, regex(KIMI), False),
    "bailingmoe": (None, regex(BAILING), False),
}


def make(name: str = "olmo", unknown: str | None = None) -> tokenizers.Tokenizer:
    """A byte-level BPE of 404 tokens, split as `name` is in checkpoints; 0 and 1 are special."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.normalizer, tokenizer.pre_tokenizer, ignore_merges = SPELLINGS[name]
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken("<|begin|>", normalized=False), AddedToken("<|end|>", normalized=False)]
    settings = {"vocab_size": 400, "special_tokens": special, "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=ByteLevel.alphabet(), **settings)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.model.ignore_merges = ignore_merges
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("   ")])
    tokenizer.add_tokens(
        [AddedToken("<pre>", special=True), AddedToken("<pre>x", normalized=False)]
    )
    return tokenizer


def save(folder: Path, original: tokenizers.Tokenizer | None = None, /, **files: Any) -> Path:
    """A checkpoint folder: tokenizer.json and `name=content` for other JSON files."""
    if original is not None:
        original.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    return folder


def frame(tokenizer: tokenizers.Tokenizer, single: str) -> None:
    special = [("<|begin|>", 0), ("<|end|>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=special)


@cache
def sentencepiece_model() -> bytes:
    """A trained SentencePiece BPE with byte fallback, 380 pieces."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\0", "") for line in CORPUS * 3), model_writer=out,
        model_type="bpe", vocab_size=380, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, control_symbols=["[INST]"], character_coverage=0.98,
        user_defined_symbols=["<think>"], minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def metaspace(source: Path, legacy: bool) -> tokenizers.Tokenizer:
    """What transformers makes of a SentencePiece model: merges by score, in two forms."""
    model = spm.parse(source.read_bytes(), source)
    ids = {piece.text: token for token, piece in enumerate(model.pieces)}
    merges = []
    for piece in model.pieces:
        cuts = ((piece.text[:at], piece.text[at:]) for at in range(1, len(piece.text)))
        if piece.type == spm.TokenType.NORMAL:
            merges += [(piece.score, pair) for pair in cuts if ids.keys() >= set(pair)]
    merges.sort(key=lambda entry: -entry[0])
    bpe = models.BPE(
        ids, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    if legacy:
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(parts)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    controls = [piece.text for piece in model.pieces if piece.type == spm.TokenType.CONTROL]
    controls = [AddedToken(text, normalized=False) for text in ("<unk>", *controls)]
    tokenizer.add_special_tokens(controls)
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    return tokenizer


def ranks(count: int = 300) -> dict[bytes, int]:
    """Every byte, and pairs of tokens that stand side by side in some text; token -> rank."""
    words = " ".join(CORPUS * 3).encode()
    draw, found = random.Random(5), [bytes([byte]) for byte in range(256)]
    while len(found) < count:
        start, length = draw.randrange(len(words)), draw.randrange(2, 7)
        token = words[start : start + length]
        parts = [token[:at] in found and token[at:] in found for at in range(1, length)]
        if len(token) == length and token not in found and any(parts):
            found.append(token)
    return {token: rank for rank, token in enumerate(found)}


def tiktoken_file(stored: dict[bytes, int]) -> bytes:
    """The file of such ranks."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), n) for token, n in stored.items())


def tekken(stored: dict[bytes, int], **config: Any) -> dict[str, Any]:
    """The content of a tekken.json of such ranks."""
    sizes = {"default_num_special_tokens": 30, "default_vocab_size": 320}
    pattern = pretokenizers.TABLE["tekken"].patterns[0]
    vocab = [{"rank": n, "token_bytes": base64.b64encode(t).decode()} for t, n in stored.items()]
    return {"config": {"pattern": pattern, **sizes, **config}, "vocab": vocab}
