"""Kimi Linear, Ling 3.0 and KDA alone: their files, other forms of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keelback
import tiny
import tiny_layouts
from checkpoints import edited, refused
from keelback.convert import convert
from keelback.convert.checkpoint import Checkpoint
from keelback.convert.source import Transposed
from keelback.kernels.formats.gguf import GGUF
from rewriting import rewritten, tensor
from tiny_files import raw

KIMI, LING, KDA = "kimi-groups", "ling-hub", "kda-shared"


def logits(path: Path, name: str) -> np.ndarray:
    kept = {"cache_type_k": "f32", "cache_type_v": "f32"}
    model = keelback.Model(path, threads=1, notice=lambda text: None, **kept)
    return model.forward(tiny.ids(name, 12), logits="all")[0]


# ---- files


def test_keys_and_values_are_taken_apart_by_head(tiny_file):
    path = tiny_file(KIMI, "f32")
    both = tiny.weights(KIMI)["model.layers.3.self_attn.kv_b_proj.weight"].reshape(4, 18, 16)
    assert np.array_equal(tensor(path, "blk.3.attn_k_b.weight"), both[:, :8].swapaxes(1, 2))
    assert np.array_equal(tensor(path, "blk.3.attn_v_b.weight"), both[:, 8:])


@pytest.mark.parametrize("rows", [slice(5, 40), slice(60, 99), np.array([63, 0, 17])])
def test_a_matrix_on_its_side_is_read_in_any_pieces(tmp_path, rows):
    name = "model.layers.3.self_attn.kv_b_proj.weight"
    source = Checkpoint(tiny.write_checkpoint(KIMI, tmp_path)).require(name, 72, 16)
    whole = tiny.weights(KIMI)[name].reshape(4, 18, 16)[:, :8].swapaxes(1, 2).reshape(64, 8)
    assert np.array_equal(Transposed(source, 4, 8).read(rows), whole[rows])


@pytest.mark.parametrize(
    ("name", "shape", "sign"), [(KIMI, (1, 1, 4, 1), -1), ("ling-q8", (2, 1), 1)]
)
def test_rates_have_the_sign_and_the_shape_of_llama_cpp(tiny_file, name, shape, sign):
    a_log = next(v for k, v in tiny.weights(name).items() if k.endswith("A_log"))
    layer = 1 if name == KIMI else 0
    rates = tensor(tiny_file(name, "f32"), f"blk.{layer}.ssm_a")
    np.testing.assert_allclose(rates, sign * np.exp(a_log.reshape(shape)), rtol=1e-6)


DELTA = dict.fromkeys((f"attn_{part}" for part in ("q", "k", "v", "output")), "Q8_0") | {
    "ssm_conv1d_q": "F32", "ssm_conv1d_k": "F32", "ssm_conv1d_v": "F32", "ssm_f_a": "Q8_0",
    "ssm_g_a": "Q8_0", "ssm_beta": "Q8_0", "ssm_a": "F32", "ssm_dt": "F32", "ssm_norm": "F32",
}  # fmt: skip
ATTENTION = dict.fromkeys(("q", "kv_a_mqa", "k_b", "v_b", "output"), "Q8_0") | {"kv_a_norm": "F32"}
DENSE = dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "Q8_0")
EXPERTS = (
    {f"{name}_exps": kind for name, kind in DENSE.items()}
    | {f"{name}_shexp": kind for name, kind in DENSE.items()}
    | {"ffn_gate_inp": "F32", "exp_probs_b": "F32"}
)


@pytest.mark.parametrize(
    ("name", "attends", "more", "in_attention"),
    [
        ("kimi-q8", 1, {"ssm_f_b": "Q8_0", "ssm_g_b": "Q8_0"}, {}),
        ("ling-q8", 2, {}, {"attn_gate": "Q8_0"}),
    ],
)
def test_tensors_have_llama_cpps_names_and_types(tiny_file, name, attends, more, in_attention):
    attention = {f"attn_{part}": kind for part, kind in ATTENTION.items()} | in_attention
    expected = {"token_embd": "Q8_0", "output_norm": "F32", "output": "Q8_0"}
    for i in range(3):
        layer = {"attn_norm": "F32", "ffn_norm": "F32"}
        layer |= attention if i == attends else DELTA | more
        layer |= DENSE if (name, i) == ("kimi-q8", 0) else EXPERTS
        expected |= {f"blk.{i}.{tensor}": kind for tensor, kind in layer.items()}
    found = GGUF(tiny_file(name, "q8_0")).tensors.values()
    bare = {info.name.removesuffix(".weight").removesuffix(".bias"): info for info in found}
    assert {tensor: info.block.name for tensor, info in bare.items()} == expected


def joined(path: Path) -> dict[str, Any]:
    """Queries, keys and values in one matrix, and gate and up of all experts."""
    changed: dict[str, Any] = {}

    def join(whole: str, axis: int, *parts: str) -> None:
        names = [f"{part}.weight" for part in parts]
        changed[f"{whole}.weight"] = np.concatenate([tensor(path, name) for name in names], axis)
        changed.update(dict.fromkeys(names))

    for i in (1, 2):
        join(f"blk.{i}.attn_qkv", 0, *(f"blk.{i}.attn_{part}" for part in "qkv"))
    for i in (2, 3):
        join(f"blk.{i}.ffn_gate_up_exps", 1, f"blk.{i}.ffn_gate_exps", f"blk.{i}.ffn_up_exps")
    return changed


def not_absorbed(path: Path) -> dict[str, Any]:
    """Keys and values from one matrix, written out for every head."""
    changed: dict[str, Any] = {}
    for i in (0, 3):
        name = f"model.layers.{i}.self_attn.kv_b_proj.weight"
        changed[f"blk.{i}.attn_kv_b.weight"] = tiny.weights(KIMI)[name]
        changed |= dict.fromkeys((f"blk.{i}.attn_k_b.weight", f"blk.{i}.attn_v_b.weight"))
    return changed


def with_fewer_dimensions(path: Path) -> dict[str, Any]:
    """What quantizing leaves of dimensions of one."""
    changed: dict[str, Any] = {}
    for i in (1, 2):
        changed[f"blk.{i}.ssm_a"] = tensor(path, f"blk.{i}.ssm_a").reshape(4, 1)
        for part in "qkv":
            name = f"blk.{i}.ssm_conv1d_{part}.weight"
            changed[name] = tensor(path, name).reshape(32, 1, 3)
    return changed


@pytest.mark.parametrize("form", [joined, not_absorbed, with_fewer_dimensions])
def test_files_of_another_form_give_the_same_logits(tiny_file, tmp_path, form):
    path = tiny_file(KIMI, "f32")
    other = rewritten(path, tmp_path / "other.gguf", {}, form(path))
    np.testing.assert_allclose(logits(other, KIMI), logits(path, KIMI), rtol=0, atol=1e-5)


def test_layers_that_guess_further_tokens_stay_unread(tiny_file, tmp_path):
    path = tiny_file(LING, "f32")
    keys = {"block_count": 5, "attention.head_count_kv": [0, 1, 0, 1, 1], "nextn_predict_layers": 1}
    changes = {f"bailingmoe3.{key}": value for key, value in keys.items()}
    more = {f"blk.4.{name}.weight": np.ones(5, np.float32) for name in ("nextn.hnorm", "attn_q")}
    other = rewritten(path, tmp_path / "mtp.gguf", changes, more)
    assert np.array_equal(logits(other, LING), logits(path, LING))


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        (KIMI, "attention.head_count", 0, "head_count is 0"),
        (KIMI, "attention.key_length_mla", 10, "no more than rope.dimension_count"),
        (KIMI, "attention.kv_lora_rank", 17, r"blk\.0\.attn_kv_a_mqa"),
        (KIMI, "expert_gating_func", 4, "expert_gating_func is 4"),
        (KIMI, "kda.head_dim", None, r"lacks the key kimi-linear\.kda\.head_dim"),
        (KIMI, "kda.head_dim", 9, r"blk\.1\.attn_q"),
        (KIMI, "kda.safe_gate", True, r"lacks the key kimi-linear\.kda\.gate_lower_bound"),
        (LING, "kda.gate_lower_bound", 5, "not a number below zero"),
        (LING, "swiglu_clamp_exp", [0, 0, 0, 7], "has values under bailingmoe3.swiglu_clamp_exp"),
        (LING, "rope.dimension_sections", [1, 1, 1, 0], "bailingmoe3.rope.dimension_sections"),
        (KDA, "ssm.inner_size", 47, "head_count is 4, not a divisor of 47"),
        (KDA, "ssm.group_count", 3, r"blk\.0\.attn_q"),
    ],
)
def test_files_whose_keys_do_not_fit_get_a_sentence(tiny_file, tmp_path, name, key, value, said):
    path = tiny_file(name, "f32")
    changes = {f"{GGUF(path).metadata['general.architecture']}.{key}": value}
    with pytest.raises(keelback.KeelbackError, match=said):
        logits(rewritten(path, tmp_path / "odd.gguf", changes, {}), name)


def test_limits_of_zero_are_none(tiny_file, tmp_path):
    path, changes = tiny_file(LING, "f32"), {"bailingmoe3.swiglu_clamp_exp": [0, 0, 0, 0]}
    zero = rewritten(path, tmp_path / "zero.gguf", changes, {})
    assert np.array_equal(logits(zero, LING), logits(path, LING))


# ---- checkpoints


@pytest.mark.parametrize(("counted", "left"), [(1, 2), (0, 0)])
def test_layers_that_guess_further_are_left_out_where_they_are_counted(tmp_path, counted, left):
    names = [f"model.layers.4.{name}.weight" for name in ("eh_proj", "attention.q_proj")]
    layout = tiny_layouts.Layout(
        LING,
        lambda theirs: theirs | {"num_nextn_predict_layers": counted},
        lambda theirs: theirs | {name: raw(np.ones((3, 5), np.float32)) for name in names},
    )
    checkpoint, said = tiny_layouts.write(layout, tmp_path / "ling"), []
    if left:
        convert(checkpoint, tmp_path / "out.gguf", "f32", said.append)
        line = f"{left} tensors that are no part of the language model are left out"
        assert any(text.startswith(line) for text in said)
    else:
        with pytest.raises(keelback.UnsupportedModel, match="2 tensors have no place"):
            convert(checkpoint, tmp_path / "out.gguf", "f32", said.append)


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        ("kimi-saved", ["an epsilon of 1e-06", "other heads", "short rows", "add up to one"]),
        ("ling-unbounded", ["an epsilon of 1e-06", "no lower bound"]),
        (KDA, ["no architecture for KDA"]),
        (KIMI, []),
        (LING, []),
    ],
)
def test_what_only_keelback_runs_is_said(tmp_path, name, sentences):
    said: list[str] = []
    convert(tiny.write_checkpoint(name, tmp_path / name), tmp_path / "x.gguf", "f32", said.append)
    only = [line for line in said if line.startswith("for keelback only: ")]
    assert len(only) == len(sentences)
    assert all(any(part in line for line in only) for part in sentences)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (KIMI, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (KIMI, {"mla_use_nope": False}, "mla_use_nope is False"),
        (KIMI, {"attention_bias": True}, "attention_bias is True"),
        (KIMI, {"moe_router_activation_func": "softmax"}, "moe_router_activation_func is 'soft"),
        (KIMI, {"linear_attn_config": [1]}, "linear_attn_config is no object"),
        (KIMI, {"linear_attn_config": {}}, "lacks the key linear_num_heads"),
        (
            KIMI,
            {"num_experts_per_token": 5},
            "num_experts_per_tok is 5, which does not go with 8 experts, n_group 4",
        ),
        (KIMI, {"topk_group": 5}, "topk_group 5"),
        (KIMI, {"qk_nope_head_dim": 9}, r"self_attn\.q_proj\.weight has the shape"),
        (KIMI, {"num_hidden_layers": 1}, "all layers are attention"),
        (KIMI, {"num_hidden_layers": 3}, "tensors have no place"),
        (KIMI, {"num_hidden_layers": 5}, r"lacks the tensor model\.layers\.4\.self_attn"),
        (LING, {"score_function": "softmax"}, "score_function is 'softmax'"),
        (LING, {"no_kda_lora": False}, "no_kda_lora is False"),
        (LING, {"rope_interleave": False}, "rope_interleave is False"),
        (LING, {"gated_attention_proj_granularity_type": "element_wise"}, "is 'element_wise'"),
        (LING, {"kda_lower_bound": 5}, "kda_lower_bound is 5, not a number below zero"),
        (LING, {"expert_swiglu_limit_list": [None, 0, 0, 7]}, "expert_swiglu_limit_list limits"),
        (LING, {"mrope_section": [1, 1, 1]}, "mrope_section gives"),
        (KDA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (KDA, {"attnres_block_size": 2}, "attnres_block_size asks"),
        (KDA, {"num_v_heads": 3}, "3 value heads of 12.0 do not go with num_heads 2"),
        (KDA, {"expand_v": 1.3}, "do not go with num_heads 2"),
        (KDA, {"lower_bound": 0}, "lower_bound is 0, not a number below zero"),
        (LING, {"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope_type is 'dynamic'"),
        (
            LING,
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0}},
            "mscale_all_dim",
        ),
    ],
)
def test_checkpoints_that_cannot_be_converted_get_a_sentence(tmp_path, name, changes, said):
    refused(edited(name, tmp_path, **changes), said, keelback.KeelbackError)
