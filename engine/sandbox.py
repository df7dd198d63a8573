"""The process a chat template is rendered in: a script of its own, which imports no keelback.

It reads one request (JSON) from standard input, gives up what it does not need any more, renders,
and writes one reply: {"text"}, {"refused"} for the template's own raise_exception, or {"failed"}.
What templates find there is what transformers' `apply_chat_template` gives them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from datetime import datetime
from typing import Any

_LATE = (
    "encodings.unicode_escape", "html", "pprint", "textwrap", "jinja2.constants", "jinja2.debug",
)  # fmt: skip


class Refused(Exception):
    """Raised by a template that cannot take the messages."""


def main() -> None:
    """Serve one request."""
    request = json.loads(sys.stdin.buffer.read())
    # Behind the standard library, so that nothing there can stand in for a part of it.
    sys.path += request["folders"]
    environment = _environment(datetime.fromisoformat(request["now"]))
    _give_up(request["seconds"], request["memory"])
    reply = _rendered(environment, request)
    sys.stdout.buffer.write(json.dumps(reply).encode())


def _environment(now: datetime) -> Any:
    # Later nothing can be opened, and these are imported by jinja2 when they are first used.
    for name in _LATE:
        importlib.import_module(name)
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what a model writes, for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 (so is the parent's)

        def parse(self, parser: Any) -> Scope:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": now.strftime,
        "dict": _Dict(),
        "namespace": _namespace_type(),
    }
    return environment


def _namespace_type() -> Any:
    """jinja2's namespace without the names that could mean something to Python."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")

    class PlainNamespace(Namespace):
        def __init__(*arguments: Any, **values: Any) -> None:
            self, *rest = arguments
            for name in dict(*rest, **values):
                check(name)
            Namespace.__init__(self, *rest, **values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            Namespace.__setitem__(self, name, value)

    return PlainNamespace


class _Dict:
    """What `dict` can do in a template, without being Python's type."""

    def __call__(self, *arguments: Any, **values: Any) -> dict[Any, Any]:
        return dict(*arguments, **values)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


def _raise_exception(message: Any) -> None:
    raise Refused(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _give_up(seconds: int, memory: int) -> None:
    """Bound time and memory, and leave no way to open a file, write one, or start a process."""
    try:
        import resource
    except ImportError:  # Windows: what remains is the other side's clock
        return
    limits = {
        "RLIMIT_CPU": seconds + 1, "RLIMIT_AS": memory, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": 3,
        "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0,
    }  # fmt: skip
    for name, most in limits.items():
        # Systems lack some of them, or allow no less than what is in use.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (most, most))


def _rendered(environment: Any, request: dict[str, Any]) -> dict[str, str]:
    parts, size = [], 0
    try:
        template = environment.from_string(request["template"])
        for part in template.generate(request["variables"]):
            parts.append(part)
            size += len(part)
            if size > request["size"]:
                return {"failed": f"it writes more than {request['size']} characters"}
        return {"text": "".join(parts)}
    except Refused as error:
        return {"refused": str(error)}
    except MemoryError:
        parts.clear()
        return {"failed": f"it takes more than {request['memory'] >> 20} MiB of memory"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
