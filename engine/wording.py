"""Facts as text, in which nothing can act on the terminal: notices, sizes, rates."""

from __future__ import annotations

import sys
from typing import Any

from ..kernels.errors import printable


def version() -> str:
    """Of keelback, where it is installed: a folder of its sources has none."""
    from importlib import metadata  # rarely needed, and slow to import

    try:
        return metadata.version("keelback")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def notice(text: str) -> None:
    """Tell the user about something that was done for them."""
    print(f"keelback: {printable(text)}", file=sys.stderr, flush=True)


def shown(value: Any) -> str:
    """A fact as one line of text, in which nothing can act on the terminal."""
    return printable(str(value))


def rate(count: int, seconds: float) -> str:
    """Tokens per second."""
    return f"{count / seconds:.1f} tokens/s" if seconds else "0 tokens/s"


def size(nbytes: float) -> str:
    """Bytes in a unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    raise AssertionError


def typed_size(nbytes: int, kind: str) -> str:
    """The size of a state, and the type of its matrices where that is not float32."""
    return size(nbytes) if kind == "f32" else f"{size(nbytes)} {kind}"
