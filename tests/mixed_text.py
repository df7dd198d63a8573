"""Ten thousand lines of mixed text: scripts, code, emoji, controls and what looks special."""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path

LINES = 10_000
#: Its corpus is mixed in where it is there.
SHARED = os.environ.get("KEELBACK_SHARED")

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
