"""Qwen3-Next and Qwen3.5: their files, older files and those of llama.cpp, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import keelback
import tiny
from checkpoints import edited, refused
from keelback.convert import convert
from keelback.engine.info import describe
from keelback.kernels.formats.gguf import GGUF
from rewriting import logits, rewritten, tensor

# ---- files of the converter


def test_norms_hold_what_is_multiplied_with_but_that_behind_the_recurrence(tiny_file):
    path, hf = tiny_file("qwen35-dense", "f32"), tiny.weights("qwen35-dense")
    layer = "model.layers.1."
    for theirs, ours in {
        "model.norm": "output_norm", f"{layer}input_layernorm": "blk.1.attn_norm",
        f"{layer}post_attention_layernorm": "blk.1.post_attention_norm",
        f"{layer}self_attn.q_norm": "blk.1.attn_q_norm",
        f"{layer}self_attn.k_norm": "blk.1.attn_k_norm",
    }.items():  # fmt: skip
        assert np.array_equal(tensor(path, f"{ours}.weight"), hf[f"{theirs}.weight"] + 1)
    theirs = hf["model.layers.0.linear_attn.norm.weight"]
    assert np.array_equal(tensor(path, "blk.0.ssm_norm.weight"), theirs)


def test_value_heads_of_qwen35_are_taken_in_turn_from_the_key_heads(tiny_file):
    # 2 key heads of 8 with 3 value heads of 8 each.
    path, hf = tiny_file("qwen35-dense", "f32"), tiny.weights("qwen35-dense")
    heads, at = np.array([0, 3, 1, 4, 2, 5]), "model.layers.0.linear_attn."
    rows = (8 * heads[:, None] + np.arange(8)).reshape(-1)
    channels = np.concatenate([np.arange(32), 32 + rows])
    for theirs, ours, order in (
        ("in_proj_a", "ssm_alpha", heads), ("in_proj_b", "ssm_beta", heads),
        ("in_proj_z", "attn_gate", rows), ("in_proj_qkv", "attn_qkv", channels),
    ):  # fmt: skip
        assert np.array_equal(
            tensor(path, f"blk.0.{ours}.weight"), hf[f"{at}{theirs}.weight"][order]
        )
    conv = hf[f"{at}conv1d.weight"][:, 0]
    assert np.array_equal(tensor(path, "blk.0.ssm_conv1d.weight"), conv[channels])
    out = hf[f"{at}out_proj.weight"]
    assert np.array_equal(tensor(path, "blk.0.ssm_out.weight"), out[:, rows])
    assert np.array_equal(tensor(path, "blk.0.ssm_dt.bias"), hf[f"{at}dt_bias"][heads])


def test_projections_of_qwen3_next_are_taken_apart_by_key_head(tiny_file):
    # For each of 2 key heads: a query of 8, a key of 8, 2 values of 8, and as many gates.
    path, hf = tiny_file("next-moe", "f32"), tiny.weights("next-moe")
    mixed = hf["model.layers.0.linear_attn.in_proj_qkvz.weight"].reshape(2, 48, 40)
    parts = [part.reshape(-1, 40) for part in np.split(mixed, [8, 16, 32], axis=1)]
    assert np.array_equal(tensor(path, "blk.0.attn_qkv.weight"), np.concatenate(parts[:3]))
    assert np.array_equal(tensor(path, "blk.0.attn_gate.weight"), parts[3])
    steps = hf["model.layers.0.linear_attn.in_proj_ba.weight"]
    assert np.array_equal(tensor(path, "blk.0.ssm_ba.weight"), steps)


@pytest.mark.parametrize("name", ["next-q8", "qwen35-q8", "qwen35moe-q8"])
def test_keys_say_which_layers_are_recurrent_and_how_positions_turn(tiny_file, name):
    metadata, config = GGUF(tiny_file(name, "q8_0")).metadata, tiny.VARIANTS[name].config
    arch = metadata["general.architecture"]
    recurrent = [kind == "linear_attention" for kind in config["layer_types"]]
    assert metadata[f"{arch}.attention.recurrent_layers"].tolist() == recurrent
    if arch != "qwen3next":
        assert metadata[f"{arch}.rope.dimension_sections"].tolist() == [3, 3, 2, 0]
    turned = config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]
    assert metadata[f"{arch}.rope.dimension_count"] == turned


def test_sections_that_config_does_not_name_are_those_of_qwen35(tmp_path):
    folder = tiny.write_checkpoint("qwen35-bias", tmp_path / "bias")
    metadata = GGUF(convert(folder, tmp_path / "out.gguf")).metadata
    assert metadata["qwen35.rope.dimension_sections"].tolist() == [11, 11, 10, 0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen35-bias", "keys of 12 numbers and values of 20"),
        ("qwen35-bias", "attention have biases"),
        ("next-tied", "normed with 1e-06"),
    ],
)
def test_what_llamacpp_cannot_run_is_said(tmp_path, name, said):
    heard: list[str] = []
    folder = tiny.write_checkpoint(name, tmp_path / name)
    convert(folder, tmp_path / "out.gguf", notice=heard.append)
    assert any(said in text for text in heard if text.startswith("for keelback only: "))


def test_a_state_takes_pages_only_for_layers_of_attention(tiny_file):
    # One layer of each kind: 3 rows of 64 + 64 + 128 channels and 4 heads of 32 by 32, and a key
    # head of 64 numbers for keys and as many for values, two bytes each.
    told = describe(str(tiny_file("qwen35-q8", "q8_0")))["state_bytes"]
    assert told["fixed"] == 4 * (3 * 256 + 4 * 32 * 32)
    assert told["per_token"] % (2 * 64) == 0


# ---- files of others


def test_projections_that_older_files_have_in_one_matrix_give_the_same_logits(tiny_file, tmp_path):
    path, ids = tiny_file("next-moe", "f32"), tiny.ids("next-moe", 20)
    hf, tensors = tiny.weights("next-moe"), {}
    for i in range(3):
        mixed = hf[f"model.layers.{i}.linear_attn.in_proj_qkvz.weight"]
        tensors[f"blk.{i}.ssm_in.weight"] = mixed
        tensors |= dict.fromkeys((f"blk.{i}.attn_qkv.weight", f"blk.{i}.attn_gate.weight"))
    # Such files name neither the kinds of the layers nor how often one is of attention.
    keys = dict.fromkeys(
        f"qwen3next.{key}" for key in ("attention.recurrent_layers", "full_attention_interval")
    )
    other = rewritten(path, tmp_path / "older.gguf", keys, tensors)
    np.testing.assert_allclose(logits(other, ids), logits(path, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "attends"), [("qwen35moe-q8", 0), ("next-q8", 1)])
def test_matrices_that_llamacpp_joins_give_the_same_bits(tiny_file, tmp_path, name, attends):
    path, ids, tensors = tiny_file(name, "f32"), tiny.ids(name, 20), {}

    def join(target: str, parts: tuple[str, ...], axis: int):
        tensors[target] = np.concatenate([tensor(path, part) for part in parts], axis)
        tensors.update(dict.fromkeys(parts))

    qkv = tuple(f"blk.{attends}.attn_{part}.weight" for part in "qkv")
    join(f"blk.{attends}.attn_qkv.weight", qkv, 0)
    for i in range(2):
        both = tuple(f"blk.{i}.ffn_{part}_exps.weight" for part in ("gate", "up"))
        join(f"blk.{i}.ffn_gate_up_exps.weight", both, 1)
    other = rewritten(path, tmp_path / "joined.gguf", {}, tensors)
    assert np.array_equal(logits(other, ids), logits(path, ids))


def test_layers_that_guess_further_tokens_stay_unread(tiny_file, tmp_path):
    path, ids = tiny_file("qwen35-dense", "f32"), tiny.ids("qwen35-dense", 20)
    tensors: dict[str, Any] = {
        name.replace("blk.3.", "blk.4."): tensor(path, name)
        for name in GGUF(path).tensors
        if name.startswith("blk.3.")
    }
    tensors["blk.4.nextn.eh_proj.weight"] = np.ones((40, 80), np.float32)
    keys = {
        "qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1,
        "qwen35.attention.recurrent_layers": None,
    }  # fmt: skip
    other = rewritten(path, tmp_path / "mtp.gguf", keys, tensors)
    assert np.array_equal(logits(other, ids), logits(path, ids))
    tensors["blk.3.nextn.eh_proj.weight"] = np.ones((40, 80), np.float32)
    with pytest.raises(keelback.InvalidFile, match=r"no use for, blk\.3\.nextn"):
        logits(rewritten(path, tmp_path / "odd.gguf", keys, tensors), ids)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attention.recurrent_layers", [1, 0], "not 2 times true or false"),
        ("attention.recurrent_layers", True, "not 2 times true or false"),
        ("full_attention_interval", 0, "a whole number from 1"),
        ("nextn_predict_layers", 2, "there are 2 layers in all"),
        ("nextn_predict_layers", 1 << 25, "a whole number from 0"),
        ("block_count", 3, "recurrent_layers"),
        ("attention.key_length", 32, r"blk\.1\.attn_q"),
        ("attention.head_count_kv", 2, r"blk\.1\.attn_k"),
        ("rope.dimension_count", 65, "65 values"),
        ("rope.dimension_count", 128, "128 values"),
        ("rope.scaling.type", "longrope", "'longrope'"),
        ("ssm.group_count", 3, r"blk\.0\.attn_qkv"),
        ("ssm.time_step_rank", 7, "not a divisor of 128"),
        ("ssm.conv_kernel", 3, r"blk\.0\.ssm_conv1d"),
        ("feed_forward_length", None, r"lacks the key qwen35\.feed_forward_length"),
    ],
)
def test_files_whose_keys_do_not_fit_get_a_sentence(tiny_file, tmp_path, key, value, said):
    path = tiny_file("qwen35-q8", "f32")
    with pytest.raises(keelback.KeelbackError, match=said):
        logits(rewritten(path, tmp_path / "odd.gguf", {f"qwen35.{key}": value}, {}), np.array([1]))


# ---- checkpoints that are refused


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("next-moe", {"layer_types": ["full_attention"] * 4}, "all layers are attention"),
        ("next-moe", {"layer_types": ["linear_attention"]}, "does not name 4 layers"),
        ("next-moe", {"layer_types": ["linear_attention", "sliding", "x", "x"]}, "'sliding'"),
        ("next-moe", {"full_attention_interval": 1}, "all layers are attention"),
        ("next-moe", {"full_attention_interval": 2}, r"lacks the tensor model\.layers\.1\.self_"),
        ("next-moe", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("next-moe", {"attn_output_gate": False}, "attn_output_gate is false"),
        ("next-moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("next-moe", {"mlp_only_layers": [1]}, "layers without experts"),
        ("next-moe", {"decoder_sparse_step": 2}, "layers without experts"),
        ("next-moe", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7"),
        ("next-moe", {"num_experts": 7}, r"mlp\.gate\.weight has the shape"),
        ("next-moe", {"linear_num_value_heads": 3}, "linear_num_value_heads is 3"),
        ("next-moe", {"num_key_value_heads": 3}, "num_attention_heads is 4"),
        ("next-moe", {"linear_key_head_dim": 9}, "has the shape"),
        ("qwen35-dense", {"head_dim": 48}, "has the shape"),
        ("qwen35-dense", {"rope_parameters": {"mrope_section": 8}}, "mrope_section"),
        ("qwen35-dense", {"rope_parameters": {"mrope_section": [3, 3]}}, "mrope_section"),
        ("qwen35-dense", {"rope_parameters": {"mrope_section": [3, -3, 2]}}, "mrope_section"),
        ("qwen35-dense", {"rope_parameters": {"partial_rotary_factor": 0.3}}, "turns 19 values"),
        ("qwen35-dense", {"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'"),
        ("qwen35moe-q8", {"shared_expert_intermediate_size": 31}, "has the shape"),
    ],
)
def test_checkpoints_that_cannot_be_converted_get_a_sentence(tmp_path, name, changes, said):
    refused(edited(name, tmp_path, **changes), said, keelback.KeelbackError)
