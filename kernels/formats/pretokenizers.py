"""What a GGUF says about a vocabulary by name alone: its pre-tokenizer, and the texts that end.

`tokenizer.ggml.pre` stands for patterns, a normaliser and two defaults. Source: the patterns are
those of the checkpoints' tokenizer.json files, under the names llama.cpp gives them; where its own
spelling of a pattern splits otherwise, the checkpoints are right. llama.cpp has no normaliser: a
row has the one of the vocabularies that the name was made for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UnsupportedModel

if TYPE_CHECKING:
    import tokenizers

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

_DIGITS = r"\p{N}{1,3}"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{_DIGITS}|{_PUNCTUATION}|{_SPACES}"


def _cased(upper: str, lower: str, tail: str) -> str:
    """Words that a change of case ends, each with what may follow it."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return rf"{start}{upper}*{lower}+{tail}|{start}{upper}+{lower}*{tail}"


_TEKKEN = rf"{_cased(_UPPER, _LOWER, '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    rf"{_cased(_UPPER, _LOWER, _CONTRACTIONS + '?')}|{_DIGITS}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
# llama.cpp takes all letters but Han for one kind here; Kimi's own pattern minds the case.
_NOT_HAN = r"&&[^\p{Han}]]"
_KIMI = (
    r"[\p{Han}]+|"
    rf"{_cased(_UPPER[:-1] + _NOT_HAN, _LOWER[:-1] + _NOT_HAN, _CONTRACTIONS + '?')}|{_DIGITS}"
    rf"|{_PUNCTUATION}|{_SPACES}"
)
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
# The letters that have a capital and a small form.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-"
    "ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛ"
    "Ꜣ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    "[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$",
    _DEEPSEEK_CJK, r"\p{N}",
)  # fmt: skip
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Patterns, each splitting what the one before left, and what else goes with the name.

    With `ignore_merges` a piece that is a token as a whole is that token, whatever the merges say.
    """

    patterns: tuple[str, ...]
    normalizer: str | None = None
    ignore_merges: bool = False
    add_bos: bool = False


TABLE = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "olmo": PreTokenizer((_GPT2,), "NFC"),
    "qwen2": PreTokenizer((_QWEN2,), "NFC"),
    "qwen35": PreTokenizer((_QWEN35,), "NFC"),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "dbrx": PreTokenizer((_LLAMA3,)),
    "starcoder": PreTokenizer((r"\p{N}", _GPT2)),
    "command-r": PreTokenizer((r"\p{N}", _GPT2), "NFC"),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "kimi-k2": PreTokenizer((_KIMI,)),
    # Its own pattern is spelled otherwise and splits alike.
    "bailingmoe": PreTokenizer((_QWEN2,)),
    "deepseek-v3": PreTokenizer((_DIGITS, "[\u4e00-\u9fa5\u3040-\u30ff]+", _DEEPSEEK_V3)),
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
_SAME = {
    "gpt-2": "phi-2 gigachat a.x-4.0 mellum exaone4 jais trillion granite-docling",
    "olmo": "mpt gpt-neox",
    "qwen2": "deepseek-r1-qwen stablelm2 megrez kormo f2llmv2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 lfm2 pixtral midm-2.0",
    "dbrx": "smaug-bpe chatglm-bpe",
    "starcoder": "refact smollm codeshell exaone minerva-7b mellum2",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    "bailingmoe": "bailingmoe2 llada-moe",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
}
ALIASES = {alias: name for name, aliases in _SAME.items() for alias in aliases.split()}

#: GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = {chr(byte): byte for byte in _PRINTABLE}
BYTES |= {chr(0x100 + place): byte for place, byte in enumerate(_OTHERS)}
SYMBOLS = {byte: symbol for symbol, byte in BYTES.items()}

# Tokens whose text alone ends a generation: many files mark only one of them as such.
END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<EOT>", "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|return|>",
    "<|call|>", "<|calls|>", "<|flush|>", "</s>", "<|eom_id|>", "[EOS]", "<eos>", "<turn|>",
    "<|tool_response>", "[e~[",
)  # fmt: skip
# Likewise the fill-in-the-middle tokens behind which a model has nothing more to say.
FILL_END_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}

_TRICKY = (
    "I'm sure they'll say it's what we've, you're, he'd, can't",
    "I'M SURE THEY'LL SAY IT'S WHAT WE'VE, YOU'RE, HE'D, CAN'T",
    "it'ſ 'Tis '' 'x ' s ’s it 's 'Sx 'Tx 'REx 'VEx 'Mx 'LLx 'Dx",
    "'sx 'tx 'rex 'vex 'mx 'llx 'dx",
    "1 12 123 1234 12345 1234567 a1b22c333 -1,234.56 1/2 ½ ⅓ ² ٣ 四 Ⅻ",
    "Hello World HELLOworld helloWORLD McDonald iPhone ǅungla ʰa ªº ﬁn ǄA",
    "日本語と中文 混在text한국어 ภาษาไทย हिन्दी العربية עברית Ελληνικά кириллица",
    "e\u0301 o\u0302\u0323 \u1100\u1161\u11a8 \u212b \u2126 \u212a \u037e",
    "q\u0307\u0323 x\u0301y \u0301",
    "😀 👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 a😀b ❤️ \u200d\ufe0f",
    " x  y   z    w\t\tt\t \tu \n v\n\nw \n \n x\r\ny\r\rz   ",
    "   leading", "trailing   ", "\n\n  \n\n", "\t", "  ",
    "a\u00a0b\u00a0\u00a0c \u2003d\u3000e\u0085f",
    "!?...\n\nWhat?!\r\n\r\nno;\n(x)/\n//\n/// a/b </s> <|x|> $+<=>^~|` $x +y =z",
    "\0\x01\x02a\x1b[0m\x7f \x0b\x0c\x85",
    "if (x == 10) {\n\treturn foo_bar(x, 'y');\n}\n",
)  # fmt: skip
# Seconds to split all probes: a hostile pattern can take hours without reaching a library's limit.
_PATIENCE = 5.0
# One of each kind of character the patterns tell apart; every run of three of them is probed.
_KINDS = ("s", "S", "ǅ", "中", "\u0301", "7", "½", "!", "'", "/", "$", " ", "\n", "\t", "\u00a0")


@cache
def probes() -> tuple[str, ...]:
    """The texts by which two pre-tokenizers are told apart."""
    return _TRICKY + tuple(map("".join, product(_KINDS, repeat=3)))


def find(name: str) -> PreTokenizer | None:
    """The row of a `tokenizer.ggml.pre` name, or None when it is not known."""
    return TABLE.get(ALIASES.get(name, name))


def build(row: PreTokenizer) -> tuple[Any, Any]:
    """The normaliser (or None) and the pre-tokenizer of a row, as objects of `tokenizers`."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in row.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    normalizer = normalizers.NFC() if row.normalizer == "NFC" else None
    return normalizer, pre_tokenizers.Sequence([*splits, to_bytes])


class Recognised(NamedTuple):
    """A name, and what the tokenizer does where it differs from what the name stands for."""

    name: str
    normalizer: str | None
    ignore_merges: bool


def recognise(tokenizer: tokenizers.Tokenizer) -> Recognised:
    """The `tokenizer.ggml.pre` name of a byte-level BPE, found by what it does to the probes.

    Raises UnsupportedModel when no known patterns do the same to every one of them, or when text
    is normalised in another way than NFC.
    """
    _check_options(tokenizer)
    if tokenizer.pre_tokenizer is None:
        raise UnsupportedModel("the tokenizer has no pre-tokenizer, so GGUF has no name for it")
    stored: Any = tokenizer.normalizer
    # An empty sequence of normalisers is one, and false.
    normalizer = check_normalizer(None if stored is None else json.loads(stored.__getstate__()))
    observed = list(_pieces(tokenizer.pre_tokenizer))
    alike = [name for name, row in TABLE.items() if _behaves(row, observed)]
    if not alike:
        raise UnsupportedModel(
            "the tokenizer splits text as none of the pre-tokenizers keelback knows "
            f"({', '.join(TABLE)}), so its ids could not be reproduced"
        )
    ignores = bool(tokenizer.model.ignore_merges)

    def distance(name: str) -> tuple[bool, bool]:
        """llama.cpp knows no normaliser, so the other difference matters more."""
        row = TABLE[name]
        return row.ignore_merges != ignores, row.normalizer != normalizer

    return Recognised(min(alike, key=distance), normalizer, ignores)


def _behaves(row: PreTokenizer, observed: list[list[str]]) -> bool:
    return all(a == b for a, b in zip(_pieces(build(row)[1]), observed, strict=True))


def _pieces(pre_tokenizer: Any) -> Iterator[list[str]]:
    began = time.monotonic()
    for probe in probes():
        if time.monotonic() - began > _PATIENCE:
            raise UnsupportedModel("the tokenizer's patterns take too long to be used on any text")
        yield [piece for piece, _ in pre_tokenizer.pre_tokenize_str(probe)]


def check_normalizer(node: Any) -> str | None:
    """ "NFC" or None, from the JSON of a tokenizer's normaliser.

    By its kind and not by trial: a replacement of certain words would show in no probe. Raises
    UnsupportedModel for any other.
    """
    kinds = _kinds(node)
    if not kinds <= {"NFC"}:
        names = ", ".join(sorted(kinds))[:200]
        raise UnsupportedModel(f"the tokenizer normalises text by {names}; keelback knows NFC")
    return "NFC" if kinds else None


def _kinds(node: Any) -> set[str]:
    if not isinstance(node, dict):
        return set() if node is None else {str(node)}
    parts = node.get("normalizers")
    if node.get("type") == "Sequence" and isinstance(parts, list):
        return set().union(*map(_kinds, parts))
    return {str(node.get("type"))}


def _check_options(tokenizer: tokenizers.Tokenizer) -> None:
    """Refuse options of the BPE model that GGUF has no key for."""
    from tokenizers import models, pre_tokenizers

    model = tokenizer.model
    if not isinstance(model, models.BPE):
        raise UnsupportedModel(f"the tokenizer is a {type(model).__name__}, not a byte-level BPE")
    options = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    options += ["byte_fallback", "fuse_unk"]
    # Where every byte is a token the unknown token is never reached, and may be named.
    if not tokenizer.get_vocab().keys() >= set(pre_tokenizers.ByteLevel.alphabet()):
        options.append("unk_token")
    for option in options:
        if getattr(model, option):
            raise UnsupportedModel(
                f"the tokenizer's model sets {option} = {getattr(model, option)!r}, "
                "which GGUF has no key for"
            )
