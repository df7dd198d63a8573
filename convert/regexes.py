"""Which regular expressions of a stranger's tokenizer.json may be compiled and run.

Backtracking takes exponential time on some patterns, and repeated repetitions exponential memory.
Every pre-tokenizer in use is a row of alternatives of a few characters' kinds each; only such
patterns pass, and those cost at most the square of a text's length.
"""

from __future__ import annotations

import re
from typing import Any

_LONGEST = 2000
_MOST_ALTERNATIVES, _MOST_UNBOUNDED, _MOST_VARIABLE, _MOST_FIXED = 64, 2, 5, 512

# One character, however it is written: a class without classes in it, or something escaped.
_CLASS = re.compile(r"\[\^?(?:\\[pP]\{\^?\w+\}|\\.|[^\[\]\\])+\]", re.DOTALL)
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?\w+\}|[dDsSwWhHnrtvfbBAzZ]|x\{?[0-9A-Fa-f]+\}?|u[0-9A-Fa-f]{4}|[^\w])"
)
_OPENING = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|i:))?")
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
# A repetition may be possessive or lazy, a counted one may not: that would repeat it again.
_REPEATED = re.compile(r"\)(?:[*+]|\{)|[*+?](?:[*{]|[+?][*+?{])|\}[*+?{]")


def why_not(pattern: str) -> str | None:
    """What is wrong with a pattern, or None where it may run."""
    if len(pattern) > _LONGEST:
        return f"is longer than {_LONGEST} characters"
    plain, before = pattern, ""
    while plain != before:
        plain, before = _CLASS.sub("x", plain), plain
    plain = _OPENING.sub("(", _ESCAPE.sub("x", plain))
    if re.search(r"[\[\]\\]|\(\?", plain):
        return "uses more than classes, alternatives, repetitions and plain groups"
    alternatives = _alternatives(plain)
    if alternatives is None or _REPEATED.search(plain):
        return "repeats what is repeated already, or a group"
    if len(alternatives) > _MOST_ALTERNATIVES:
        return f"has more than {_MOST_ALTERNATIVES} alternatives"
    for alternative in alternatives:
        unbounded = len(re.findall(r"(?<![*+?}])[*+]", alternative))
        optional = len(re.findall(r"(?<![*+?}])\?", alternative))
        for low, comma, high in _COUNT.findall(alternative):
            if len(low + high) > 6 or max(int(low or 0), int(high or 0)) > _MOST_FIXED:
                return f"repeats something more than {_MOST_FIXED} times"
            unbounded += bool(comma) and not high
            optional += bool(comma) and bool(high)
        if unbounded > _MOST_UNBOUNDED or unbounded + optional > _MOST_VARIABLE:
            return "repeats too many things in a row"
    return None


def _alternatives(plain: str) -> list[str] | None:
    """What stands between the bars outside of groups, or None where the brackets do not match."""
    depth, found = 0, [""]
    for letter in plain:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return None
        if letter == "|" and not depth:
            found.append("")
        else:
            found[-1] += letter
    return None if depth else found


def patterns_of(node: Any) -> list[str]:
    """Every {"Regex": pattern} below a node of a JSON document."""
    found, left = [], [node]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            found += [str(value["Regex"])] if "Regex" in value else []
            left += value.values()
        elif isinstance(value, list):
            left += value
    return found
