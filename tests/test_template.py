"""Chat templates: what they make of messages, and what a hostile one comes to.

golden/templates.json was made by template_reference.py with transformers. Two environment variables
add llama.cpp's collection of templates, rendered there and here:

    KEELBACK_LLAMACPP_SOURCE  llama.cpp's source; llama-cpp-python's sdist has it
    KEELBACK_LLAMACPP_PYTHON  a Python with transformers; default this one
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from keelback.engine import template as templates
from keelback.engine.template import render
from keelback.kernels.errors import InvalidFile, InvalidInput, KeelbackError
from template_reference import NOW

HERE = Path(__file__).parent
CASES = json.loads((HERE / "golden" / "templates.json").read_text("utf-8"))
USER = {"role": "user", "content": "Who?"}


def ours(job: dict[str, Any]) -> str | None:
    try:
        return render(**job, now=NOW)
    except KeelbackError:
        return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_template_renders_as_in_transformers(case: dict[str, Any]):
    assert ours(case["job"]) == case["answer"]


#: Templates that would take for ever or fill memory, break out, or are wrong; and what is said.
HOSTILE = {
    "an endless loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "took more than 1 seconds"),
    "a number without end": ("{{ 9 ** 99999999 }}", "took more than 1 seconds"),
    "a huge text": ("{{ 'a' * 10 ** 9 }}", "more than 512 MiB"),
    "a text that doubles": (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "more than 512 MiB"),
    "a wide format": ("{{ '%0999999999d' | format(1) }}", "more than 512 MiB"),
    "a long answer": (
        "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "writes more than"),
    "a recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "deep nesting": ("{{ " + "[" * 100_000 + " }}", "RecursionError"),
    "a syntax error": ("{% for %}", "TemplateSyntaxError"),
    "an unknown name": ("{{ nobody.at.all }}", "'nobody' is undefined"),
    "Python's insides": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "insides through a format": ("{{ '{0.__globals__[json]}'.format(raise_exception) }}", "unsafe"),
    "insides through a global": ("{{ cycler.__init__.__globals__.os }}", "SecurityError"),
    "insides in a namespace": (
        "{% set n = namespace() %}{% set n.__class__ = 1 %}", "SecurityError"),
    "a change of the messages": ("{{ messages.append(1) }}", "SecurityError"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "a module": ("{% import 'os' as os %}", "no loader"),
    "a text too long": ("x" * (1 << 20) + "{", "is longer than 1048576"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_gets_a_sentence(monkeypatch: pytest.MonkeyPatch, case: str):
    template, said = HOSTILE[case]
    if "seconds" in said:
        monkeypatch.setattr(templates, "SECONDS", 1)
    with pytest.raises(InvalidFile) as caught:
        render(template, [USER], origin="tokenizer.chat_template of some.gguf")
    sentence = str(caught.value)
    assert sentence.startswith("tokenizer.chat_template of some.gguf ") and said in sentence
    assert sentence.isprintable() and len(sentence) < 500


def test_a_templates_own_refusal_is_passed_on():
    with pytest.raises(InvalidInput, match=r"refuses these messages: no\\x1b\\nsystem$"):
        render("{{ raise_exception('no\x1b\nsystem') }}", [USER])


def test_messages_that_are_too_large_or_no_json_get_a_sentence():
    with pytest.raises(InvalidInput, match="shorten them"):
        render("{{ messages }}", [{"role": "user", "content": "x" * (17 << 20)}])
    with pytest.raises(InvalidInput, match="not JSON serializable"):
        render("{{ messages }}", [{"role": "user", "content": object()}])


#: What the child has given up by the time a template runs; each line must fail.
ESCAPED = """
import json, os, socket, subprocess, sys
sys.argv = ["sandbox.py"]
source = open({path!r}).read()
tail = "parts, size = [], 0"
assert tail in source
tries = '''
    done = {{}}
    import os, socket
    for name, action in {{
        "read": lambda: open("/etc/passwd"),
        "write": lambda: open("/tmp/keelback-escaped", "w"),
        "connect": lambda: socket.socket(),
        "raise": lambda: __import__("resource").setrlimit(7, (99, 99)) if os.getuid() else 1 / 0,
        "environment": lambda: os.environ["HOME"],
    }}.items():
        try:
            action()
            done[name] = True
        except Exception:
            done[name] = False
    return {{"text": json.dumps(done)}}
'''
exec(compile(source.replace("    " + tail, tries), "sandbox.py", "exec"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of other systems differ")
def test_what_escapes_jinjas_sandbox_finds_nothing_open(tmp_path: Path, monkeypatch):
    """The process's own limits, tried by code that is already out of the sandbox."""
    sandbox = Path(templates.__file__).with_name("sandbox.py")
    (tmp_path / "sandbox.py").write_text(ESCAPED.format(path=str(sandbox)))
    monkeypatch.setattr(templates, "__file__", str(tmp_path / "template.py"))
    done = json.loads(render("", [USER]))
    assert done and not any(done.values())


def test_a_child_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sandbox.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(templates, "__file__", str(tmp_path / "template.py"))
    with pytest.raises(InvalidFile, match="ended its process"):
        render("", [USER])
    monkeypatch.setattr(templates.sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(InvalidInput, match="no process can be started"):
        render("", [USER])


#: Ctrl-C on the terminal of the process that renders: a signal to all of its group.
PRESSES = """
import json, os, signal
os.killpg(os.getpgid(os.getppid()), signal.SIGINT)
print(json.dumps({"text": "rendered"}))
"""
RENDERS = """
import signal, sys
from keelback.engine import template
signal.signal(signal.SIGINT, lambda *_: print("pressed"))
template.__file__ = sys.argv[1]
print(template.render("", []))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_is_not_the_templates_fault(tmp_path: Path):
    (tmp_path / "sandbox.py").write_text(PRESSES)
    done = subprocess.run(
        [sys.executable, "-c", RENDERS, str(tmp_path / "template.py")],
        capture_output=True, text=True, timeout=60, start_new_session=True,
    )  # fmt: skip
    assert done.stdout == "pressed\nrendered\n", done.stderr


TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "é <b>", "parameters": {"type": "object"}},
}
CALL = {
    "type": "function",
    "id": "call_1ab",
    "function": {"name": "weather", "arguments": {"a": 1}},
}
ASKED = {"role": "user", "content": " What is <b>&\"'é\n  "}
TALKS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Be brief. "}, ASKED]},
    {
        "messages": [ASKED, {"role": "assistant", "content": " No.", "thinking": "hm"}, ASKED],
        "add_generation_prompt": False,
    },
    {
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1ab", "name": "weather", "content": "{}"},
        ],
        "tools": [TOOL],
    },
]


def test_llamacpps_collection_renders_as_in_transformers():
    source = os.environ.get("KEELBACK_LLAMACPP_SOURCE")
    if not source:
        pytest.skip("KEELBACK_LLAMACPP_SOURCE is not set")
    files = sorted(Path(source, "models", "templates").glob("*.jinja"))
    if not files:
        pytest.skip("this source holds no models/templates")
    python = os.environ.get("KEELBACK_LLAMACPP_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import transformers"], capture_output=True).returncode:
        pytest.skip("transformers is not installed there")
    common = {"add_generation_prompt": True, "tools": None}
    tokens = {"variables": {"bos_token": "<s>", "eos_token": "</s>"}}
    jobs = [
        {"template": file.read_text("utf-8"), **common, **talk, **tokens}
        for file in files
        for talk in TALKS
    ]
    reference = subprocess.run(
        [python, str(HERE / "template_reference.py")],
        input=json.dumps(jobs), capture_output=True, text=True, check=True,
    )  # fmt: skip
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(ours, jobs))
    assert answers == json.loads(reference.stdout)
    assert sum(answer is not None for answer in answers) > 2 * len(files)
