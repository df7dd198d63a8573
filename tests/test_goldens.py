"""The tiny checkpoints, converted and run, against the logits of the reference implementations.

golden/ was made by make_golden.py with transformers and flash-linear-attention in float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import model_table
import tiny
from distances import row_errors
from keelback import models
from keelback.kernels.formats.gguf import GGUF

GOLDEN = Path(__file__).parent / "golden"
#: What the README's table of models says.
CLAIMED = model_table.claimed()
#: Measured: 6.4e-6 at most by kernels (qwen35moe-fused), 9.7e-6 by NumPy (ling-hub).
TOLERANCE = 2e-5
Q8_0_VARIANTS = tuple(name for name in tiny.VARIANTS if name.endswith("-q8"))
HALF_TOLERANCE = 0.05
#: Eight bits a weight and eight an activation move the logits of random weights this far.
Q8_0_TOLERANCE = 0.12
#: The definition rounds activations as the kernel does. Only seldom one falls the other way, which
#: moves all rows behind it by some 5e-3.
AGREEMENT = 1e-2


def by_steps(model, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits of one forward a token, and the final state block."""
    state, rows = model.new_state(), []
    for token in ids:
        logits, state = model.forward([int(token)], state)
        rows.append(logits)
    return np.stack(rows), state.block


def test_the_readme_names_every_architecture_that_runs():
    assert set(CLAIMED) == set(models.architectures()) == set(model_table.MODELS)


@pytest.mark.parametrize(
    ("error", "said"), [(2.1e-6, "3e-6"), (3e-6, "3e-6"), (9.3e-7, "1e-6"), (9e-7, "9e-7")]
)
def test_errors_are_rounded_up_to_one_digit(error: float, said: str):
    assert model_table.rounded_up(error) == said


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_logits_of_an_f32_file_are_those_of_the_reference(tiny_model, name, backend):
    golden = np.load(GOLDEN / f"{name}.npz")
    model = tiny_model(name, "f32", backend)
    at_once, state = model.forward(golden["ids"], logits="all")
    worst = row_errors(at_once, golden["logits"]).max()
    claimed = CLAIMED[model.metadata["general.architecture"]]
    # The README allows twice what was measured: another processor adds up in another order.
    assert worst < (2 * claimed if backend == "cpu" else TOLERANCE), f"{name}: {worst:.2e}"
    stepped, block = by_steps(model, golden["ids"])
    worst = row_errors(stepped, golden["logits"]).max()
    assert worst < TOLERANCE, f"{name} on {backend}, by steps: {worst:.2e}"
    if backend == "cpu":
        assert np.array_equal(stepped, at_once) and np.array_equal(block, state.block)


@pytest.mark.parametrize("name", Q8_0_VARIANTS)
def test_a_q8_0_file_stays_near_the_reference_on_both_backends_alike(tiny_model, name):
    golden = np.load(GOLDEN / f"{name}.npz")
    defined, _ = tiny_model(name, "q8_0", "numpy").forward(golden["ids"], logits="all")
    model = tiny_model(name, "q8_0")
    logits, state = model.forward(golden["ids"], logits="all")
    worst = row_errors(logits, golden["logits"]).max()
    assert worst < Q8_0_TOLERANCE, f"{name}: {worst:.2e}"
    errors = row_errors(logits, defined)
    assert errors.min() < TOLERANCE, f"{name} against its definition: no row agrees"
    assert errors.max() < AGREEMENT, f"{name} against its definition: {errors.max():.2e}"
    stepped, block = by_steps(model, golden["ids"])
    assert np.array_equal(stepped, logits) and np.array_equal(block, state.block)


@pytest.mark.parametrize("outtype", ["f16", "bf16"])
@pytest.mark.parametrize(
    "name", ["mamba-untied", "mamba2-g2", "gdn-gate", "granite-moe", "bamba-bias"]
)
def test_half_precision_files_agree_on_both_backends(tiny_model, name, outtype):
    ids = tiny.ids(name, 40)
    defined, _ = tiny_model(name, outtype, "numpy").forward(ids, logits="all")
    logits, _ = tiny_model(name, outtype).forward(ids, logits="all")
    worst = row_errors(logits, defined).max()
    assert worst < TOLERANCE, f"{name} in {outtype}: {worst:.2e}"
    golden = np.load(GOLDEN / f"{name}.npz")["logits"]
    worst = row_errors(logits, golden).max()
    assert worst < HALF_TOLERANCE, f"{name} in {outtype} against the reference: {worst:.2e}"


@pytest.mark.parametrize("name", Q8_0_VARIANTS)
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_a_prompt_of_several_chunks_gives_logits_on_both_backends(tiny_model, name, backend):
    # No row of the first chunk is asked for: every op from `select` on runs on no rows at all.
    logits, state = tiny_model(name, "q8_0", backend).forward(tiny.ids(name, 520))
    assert np.isfinite(logits).all() and state.position == 520


# One variant of each family, and what its file holds beyond the embedding and the head.
TENSORS = {
    "mamba-untied": {
        "attn_norm.weight": "F32", "ssm_in.weight": "Q8_0", "ssm_conv1d.weight": "F32",
        "ssm_conv1d.bias": "F32", "ssm_x.weight": "Q8_0", "ssm_dt.weight": "Q8_0",
        "ssm_dt.bias": "F32", "ssm_a": "F32", "ssm_d": "F32", "ssm_out.weight": "Q8_0",
    },
    "mamba2-q8": {
        "attn_norm.weight": "F32", "ssm_in.weight": "Q8_0", "ssm_conv1d.weight": "F32",
        "ssm_conv1d.bias": "F32", "ssm_dt.bias": "F32", "ssm_a": "F32", "ssm_d": "F32",
        "ssm_norm.weight": "F32", "ssm_out.weight": "Q8_0",
    },
    "gdn-q8": {
        "attn_norm.weight": "F32", "attn_qkv.weight": "Q8_0", "attn_gate.weight": "Q8_0",
        "ssm_conv1d.weight": "F32", "ssm_alpha.weight": "Q8_0", "ssm_beta.weight": "Q8_0",
        "ssm_a": "F32", "ssm_dt.bias": "F32", "ssm_norm.weight": "F32", "ssm_out.weight": "Q8_0",
        "ffn_norm.weight": "F32", "ffn_gate.weight": "Q8_0", "ffn_up.weight": "Q8_0",
        "ffn_down.weight": "Q8_0",
    },
    "granite-q8": {
        "attn_norm.weight": "F32", "ffn_norm.weight": "F32", "ffn_gate_inp.weight": "F32",
        "ffn_gate_exps.weight": "Q8_0", "ffn_up_exps.weight": "Q8_0",
        "ffn_down_exps.weight": "Q8_0", "ffn_gate_shexp.weight": "Q8_0",
        "ffn_up_shexp.weight": "Q8_0", "ffn_down_shexp.weight": "Q8_0",
    },
}  # fmt: skip
#: What the layers of a hybrid hold by turns.
MAMBA2 = {name: kind for name, kind in TENSORS["mamba2-q8"].items() if "attn_norm" not in name}
ATTENTION = dict.fromkeys((f"attn_{part}.weight" for part in ("q", "k", "v", "output")), "Q8_0")
BY_TURNS = {"granite-q8": (MAMBA2, ATTENTION, MAMBA2)}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_tensors_have_llama_cpps_names_and_types(tiny_file, name, outtype):
    file, config = GGUF(tiny_file(name, outtype)), tiny.VARIANTS[name].config
    expected = {"token_embd.weight": "Q8_0", "output_norm.weight": "F32"}
    if not config["tie_word_embeddings"]:
        expected["output.weight"] = "Q8_0"
    for i in range(config["num_hidden_layers"]):
        layer = TENSORS[name] | (BY_TURNS[name][i] if name in BY_TURNS else {})
        expected |= {f"blk.{i}.{tensor}": kind for tensor, kind in layer.items()}
    for tensor, kind in expected.items():
        # Rows that do not divide into blocks of 32 are kept as F16.
        divides = file.tensors[tensor].shape[-1] % 32 == 0
        matrices = "F16" if outtype == "q8_0" and not divides else outtype.upper()
        expected[tensor] = "F32" if kind == "F32" else matrices
    assert {info.name: info.block.name for info in file.tensors.values()} == expected
