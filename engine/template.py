"""Chat templates: a model file's text that turns messages into a prompt, run as a stranger's code.

jinja2's sandbox keeps a template from Python, but not from running for ever or filling memory, and
a thread cannot be stopped. So a template is rendered in a child process (`sandbox.py`), which
starts in a tenth of a second without NumPy and without this package, and is killed at its limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidFile, InvalidInput

#: Seconds, by the clock and of the processor, and bytes of memory that a template may take.
SECONDS = 5
MEMORY = 512 << 20
#: Characters that a template may be long, bytes of all messages in JSON, characters of the prompt.
LARGEST_TEMPLATE = 1 << 20
LARGEST_REQUEST = 16 << 20
LARGEST_TEXT = 16 << 20

_LONGEST_SAYING = 300
_REMEDY = "; give another one with --chat-template-file"
_REASONING = ("reasoning_content", "thinking", "reasoning")
# All that a Python may need to start; nothing else of the environment is a template's business.
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    origin: str = "the chat template",
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
    variables: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> str:
    """The text of `messages` by a Jinja template, as transformers' `apply_chat_template` has it.

    messages: {"role", "content", ...}, of what JSON can hold, as are `tools` and `variables`, which
    a template finds by their names. `origin` names the template in messages to the user; `now` is
    the time that `strftime_now` tells. Raises InvalidFile for a template that is wrong, unsafe, or
    beyond a limit, InvalidInput for messages that it refuses or that are too large.
    """
    if len(template) > LARGEST_TEMPLATE:
        raise InvalidFile(f"{origin} is longer than {LARGEST_TEMPLATE} characters{_REMEDY}")
    given: dict[str, Any] = {
        "messages": [_with_reasoning(message) for message in messages],
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    given |= {name: text for name, text in tokens.items() if text is not None}
    given.update(variables or {})
    request = {
        "folders": _folders(),
        "template": template,
        "variables": given,
        "now": (now or datetime.now()).isoformat(),
        "seconds": SECONDS,
        "memory": MEMORY,
        "size": LARGEST_TEXT,
    }
    try:
        raw = json.dumps(request).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"the messages cannot be given to {origin} ({error})") from None
    if len(raw) > LARGEST_REQUEST:
        raise InvalidInput(
            f"the messages take {len(raw)} bytes, and a chat can have {LARGEST_REQUEST}; "
            "shorten them, or give the text as a plain prompt"
        )
    return _text_of(_reply(raw, origin), origin)


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose reasoning, under any of its names, is found by templates of every age."""
    found = (message[name] for name in _REASONING if message.get(name) is not None)
    reasoning = next(found, None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _reply(request: bytes, origin: str) -> dict[str, Any]:
    """Run the child. It reads before it writes, so one thread can do both; a clock ends it."""
    late: list[bool] = []

    def stop() -> None:
        late.append(True)
        child.kill()

    try:
        with _start() as child:
            clock = threading.Timer(SECONDS, stop)
            clock.start()
            assert child.stdin is not None and child.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError), child.stdin:  # it may have been killed
                    child.stdin.write(request)
                # In ASCII a character of JSON takes up to twelve bytes.
                raw = child.stdout.read(12 * LARGEST_TEXT + 64)
            finally:
                clock.cancel()
                child.kill()
    except OSError as error:
        raise InvalidInput(f"no process can be started for {origin} ({error.strerror})") from None
    try:
        reply = json.loads(raw)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        what = f"took more than {SECONDS} seconds" if late else "ended its process"
        raise InvalidFile(f"{origin} {what} and was stopped{_REMEDY}")
    return reply


def _start() -> subprocess.Popen[bytes]:
    # No user's settings (-I), no site-packages but jinja2's (-S), no files of byte code (-B).
    command = [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("sandbox.py"))]
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    # In a session of its own: Ctrl-C is this process's business, which then ends that one.
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=kept,
        start_new_session=True,
    )  # fmt: skip


def _text_of(reply: Mapping[str, Any], origin: str) -> str:
    for kind in ("refused", "failed"):
        if kind in reply:
            said = str(reply[kind])[:_LONGEST_SAYING]
            if kind == "refused":
                raise InvalidInput(f"{origin} refuses these messages: {said}")
            raise InvalidFile(f"{origin} cannot be used ({said}){_REMEDY}")
    text = reply.get("text")
    if not isinstance(text, str) or len(text) > LARGEST_TEXT:
        raise InvalidFile(f"{origin} gives no text{_REMEDY}")
    return text


@cache
def _folders() -> list[str]:
    """Where jinja2 and what it needs are found, for a process that knows the standard library."""
    specs = [find_spec(name) for name in ("jinja2", "markupsafe")]
    origins = [spec.origin for spec in specs if spec is not None and spec.origin is not None]
    if len(origins) != len(specs):
        raise ImportError("jinja2 is not installed")
    return sorted({str(Path(origin).parent.parent) for origin in origins})
