"""The house rules that a program can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import keelback
from keelback import models

ROOT = Path(keelback.__file__).parent
FOLDERS = ("kernels", "models", "convert", "engine")
FILES = sorted(
    [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
)
TESTS = Path(__file__).parent

#: What each floor may import from.
BELOW = {
    "kernels": {"kernels"},
    "models": {"kernels", "models"},
    "convert": {"kernels", "convert"},
    "engine": {"kernels", "models", "engine"},
}
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 60, 100


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported(path: Path) -> set[str]:
    """The folders of the package that a file imports from, by its relative imports."""
    folder = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            targets = (
                [(*base, *node.module.split("."))]
                if node.module
                else [(*base, n.name) for n in node.names]
            )
            found |= {target[0] for target in targets}
    return found


def test_no_floor_imports_from_a_higher_one():
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for path in FILES
        if (floor := path.relative_to(ROOT).parts[0]) in BELOW
        for target in imported(path) - BELOW[floor]
    ]
    assert not wrong


def test_the_package_imports_itself_relatively():
    absolute = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree(path))
        if (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").startswith("keelback")
        )
        or (
            isinstance(node, ast.Import)
            and any(name.name.startswith("keelback") for name in node.names)
        )
    ]
    assert not absolute


def test_one_module_meets_the_compiler():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        for node in ast.walk(tree(path))
        if "jit(" in ast.unparse(node) and isinstance(node, ast.Call)
    }
    assert users == {"kernels/jit.py"}


def test_files_and_functions_keep_to_their_budgets():
    over = []
    names = {path: path.relative_to(ROOT) for path in FILES}
    names |= {path: path.relative_to(TESTS.parent) for path in TESTS.rglob("*.py")}
    for path, name in names.items():
        text = path.read_text("utf-8")
        if text.count("\n") > FILE_LINES:
            over.append(f"{name}: {text.count(chr(10))} lines")
        limit = KERNEL_LINES if name.parts[0] == "kernels" else FUNCTION_LINES
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > limit:
                    over.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    assert not over


def test_engine_and_kernels_know_no_architecture_by_name():
    named = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"
        for path in FILES
        if path.relative_to(ROOT).parts[0] in ("engine", "kernels")
        # Whose names are those of vocabularies, which are called after models.
        and path.name != "pretokenizers.py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and node.value in models.architectures()
    ]
    assert not named


@pytest.mark.parametrize(
    "statement", ["import keelback.cli", "import keelback; keelback.load('demo').forward([1])"]
)
def test_a_warm_start_imports_no_compiler(statement: str):
    keelback.load("demo")  # now the kernels are compiled and kept
    loaded = "[name for name in ('numba', 'torch', 'cupy') if name in sys.modules]"
    check = f"{statement}\nimport sys\nprint({loaded})"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_the_library_offers_loads_no_command_line():
    names = "bench", "chat", "check", "drift", "dump", "evaluation", "importance", "report"
    script = (
        f"import sys, keelback; from keelback.engine import {', '.join(names)}\n"
        "keelback.load('demo'); print('click' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
