"""Every instruction set: its dot product in assembly, and models on those this machine has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from keelback.kernels.dots import emit_dot, emit_lookup
from keelback.kernels.isa import isa

#: level -> (triple, processor, an instruction it must use, registers it must not)
DOTS = {
    "vnni512": ("x86_64-linux-gnu", "znver4", r"vpdpbusd\s.*%zmm", None),
    "vnni256": ("x86_64-linux-gnu", "alderlake", r"vpdpbusd\s.*%ymm", "%zmm"),
    "avx2": ("x86_64-linux-gnu", "x86-64-v3", r"vpmaddubsw\s.*%ymm", "%zmm"),
    "generic": ("x86_64-linux-gnu", "x86-64-v2", r"pmullw|pmaddwd", "%ymm"),
    "neon": ("aarch64-linux-gnu", "cortex-a76", r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.16b", None),
}


#: level -> the instruction that looks bytes up, and how many of them 64 bytes take.
LOOKUPS = {
    "vnni512": (r"vpshufb\s.*%zmm", 1), "vnni256": (r"vpshufb\s.*%ymm", 2),
    "avx2": (r"vpshufb\s.*%ymm", 2), "generic": (r"pshufb\s", 4), "neon": (r"tbl\s+v", 4),
}  # fmt: skip
INTS, BYTES = (ir.VectorType(ir.IntType(bits), 512 // bits) for bits in (32, 8))


def assembly(
    level: str, result: ir.Type, given: list[ir.Type], emit: Callable[..., ir.Value]
) -> str:
    """A function of nothing but what is emitted, compiled for the level's processor."""
    triple, processor, _, _ = DOTS[level]
    module = ir.Module()
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(result, given), "function")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(emit(builder, *function.args))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, opt=3)
    return machine.emit_assembly(llvm.parse_assembly(str(module)))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("level", DOTS)
def test_the_dot_product_uses_its_instruction(level: str, signed: bool):
    emit = partial(emit_dot, level=level, signed=signed)
    text, (_, _, wanted, forbidden) = assembly(level, INTS, [INTS, BYTES, INTS], emit), DOTS[level]
    assert re.search(wanted, text), text
    assert forbidden is None or forbidden not in text
    # Sixteen lanes take one instruction of 512 bits, or as many of fewer as they fill.
    lanes = {"vnni512": 1, "vnni256": 2, "neon": 4}.get(level)
    assert lanes is None or len(re.findall(wanted, text)) == lanes


@pytest.mark.parametrize("level", DOTS)
def test_the_look_up_uses_its_instruction(level: str):
    emit = partial(emit_lookup, table=tuple(range(16)), level=level)
    text, (wanted, count) = assembly(level, BYTES, [BYTES], emit), LOOKUPS[level]
    assert len(re.findall(wanted, text)) == count, text


#: Prints the level, and for each file the largest difference from the definitions' logits.
PLAY = """
import sys
import numpy as np
from keelback.engine.model import Model
from keelback.kernels.isa import isa
print(isa().name)
ids = np.random.default_rng(0).integers(0, 90, 45)
quiet = lambda text: None
for path in sys.argv[1:]:
    model = Model(path, 2, notice=quiet)
    rows, state = model.forward(ids, logits="all")
    other = model.new_state()
    for token, row in zip(ids.tolist(), rows):
        logits, other = model.forward([token], other)
        assert np.array_equal(logits.view(np.uint32), row.view(np.uint32)), path
    assert other.digest == state.digest, path
    wanted, _ = Model(path, backend="numpy", notice=quiet).forward(ids, logits="all")
    print(np.linalg.norm(rows - wanted) / np.linalg.norm(wanted))
"""
#: Between them every op of three families, and every way to unpack weights.
FILES = [
    ("mamba-q8", "q4_k_m"), ("gdn-q8", "q4_0"), ("mamba2-q8", "q8_0"), ("mamba-q8", "bf16"),
    ("mamba2-q8", "iq4_xs"), ("gdn-q8", "q3_k"), ("mamba-q8", "q2_k"), ("mamba2-q8", "q5_1"),
    ("gdn-q8", "mxfp4"),
]  # fmt: skip


@pytest.mark.parametrize("level", ["avx2", "generic"])
def test_models_run_on_lower_levels(tiny_file, level: str):
    if isa().name == "neon" and level == "avx2":
        pytest.skip("this processor knows no AVX2")
    done = subprocess.run(
        [sys.executable, "-c", PLAY, *(str(tiny_file(*names)) for names in FILES)],
        env={**os.environ, "KEELBACK_ISA": level}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, *errors = done.stdout.split()
    assert found == level
    # Activations are rounded to 8 bits, and an ulp before that may tip one.
    assert len(errors) == len(FILES) and max(map(float, errors)) < 0.03, errors


def test_an_unknown_level_is_refused_with_the_known_ones():
    done = subprocess.run(
        [sys.executable, "-m", "keelback.cli", "run", "demo", "x", "-n", "1"],
        env={**os.environ, "KEELBACK_ISA": "sse9"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "KEELBACK_ISA=sse9 is not one of" in done.stderr and "Traceback" not in done.stderr
