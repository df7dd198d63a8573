"""Nemotron-H, Falcon-H1 and Jamba: their files, files of others, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keelback
import tiny
from checkpoints import edited, refused
from keelback.convert import convert
from keelback.kernels.formats.gguf import GGUF
from rewriting import logits, rewritten, tensor

# ---- checkpoints


def test_queries_and_keys_of_nemotron_are_rearranged_though_nothing_turns_them(tiny_file):
    path, hf = tiny_file("nemotron-dense", "f32"), tiny.weights("nemotron-dense")
    # Heads of 12 values: (0, 6), (1, 7) and so on.
    for part, heads in (("q", 4), ("k", 2)):
        order = [12 * head + i + half for head in range(heads) for i in range(6) for half in (0, 6)]
        theirs = hf[f"backbone.layers.3.mixer.{part}_proj.weight"]
        assert np.array_equal(tensor(path, f"blk.3.attn_{part}.weight"), theirs[order])
    values = hf["backbone.layers.3.mixer.v_proj.weight"]
    assert np.array_equal(tensor(path, "blk.3.attn_v.weight"), values)


def test_one_matrix_for_both_ends_becomes_two_where_they_are_multiplied_apart(tiny_file):
    path, hf = tiny_file("falcon-h1-yarn", "f32"), tiny.weights("falcon-h1-yarn")
    table = hf["model.embed_tokens.weight"]
    assert np.array_equal(tensor(path, "token_embd.weight"), table * np.float32(3.7))
    assert np.array_equal(tensor(path, "output.weight"), table * np.float32(0.3))
    assert "output.weight" not in GGUF(tiny_file("falcon-h1-q8", "f32")).tensors


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nemotron-bias", "the projections have biases"),
        ("nemotron-mixed", "some layers have an MLP and others experts"),
        ("nemotron-mixed", "shared experts have biases"),
        ("falcon-h1-bias", "before its gate"),
        ("falcon-h1-bias", "a bias at its end"),
        ("jamba-bias", "not twice the hidden size"),
    ],
)
def test_what_only_keelback_runs_is_said(tmp_path: Path, name: str, said: str):
    notices: list[str] = []
    convert(
        tiny.write_checkpoint(name, tmp_path / name), tmp_path / "x.gguf", "f32", notices.append
    )
    assert any(text.startswith("for keelback only: ") and said in text for text in notices)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("nemotron-moe", {"hybrid_override_pattern": "ME*"}, "does not name 4 layers"),
        ("nemotron-moe", {"hybrid_override_pattern": "ME*X"}, "hybrid_override_pattern names 'X'"),
        ("nemotron-moe", {"hybrid_override_pattern": None}, "lacks the key layers_block_type"),
        ("nemotron-moe", {"layers_block_type": "ME*E"}, "layers_block_type is no list"),
        ("nemotron-moe", {"layers_block_type": ["conv"] * 4}, "names 'conv'"),
        ("nemotron-moe", {"mlp_hidden_act": "silu"}, "keelback runs relu2"),
        ("nemotron-moe", {"mamba_hidden_act": "gelu"}, "mamba_hidden_act is 'gelu'"),
        ("nemotron-moe", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("nemotron-moe", {"n_groups": 3}, r"mamba_num_heads is \d+, not a multiple of n_groups 3"),
        # An order of so many rows would not fit in any memory.
        (
            "nemotron-moe",
            {"num_attention_heads": 1 << 24, "head_dim": 1 << 24},
            r"q_proj\.weight has the shape",
        ),
        ("nemotron-moe", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7"),
        ("nemotron-moe", {"n_group": 4}, "n_group 4"),
        ("nemotron-moe", {"n_group": 6, "topk_group": 3}, "n_group 6"),
        ("nemotron-moe", {"n_group": 2, "topk_group": 3}, "topk_group 3"),
        ("nemotron-moe", {"moe_latent_size": 12}, r"lacks the tensor .*fc1_latent_proj"),
        ("nemotron-moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1"),
        ("nemotron-moe", {"block_configs": []}, "Puzzle"),
        ("nemotron-latent", {"moe_latent_size": None}, r"mixer\.experts"),
        ("falcon-h1-plain", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("falcon-h1-plain", {"mlp_multipliers": [1.0]}, "no list of 2 numbers"),
        ("falcon-h1-plain", {"ssm_multipliers": [1, 1, 1, 1, "x"]}, r"ssm_multipliers\[4\] is 'x'"),
        ("falcon-h1-plain", {"mamba_d_head": 9}, "mamba_d_head 9"),
        ("falcon-h1-plain", {"mamba_rms_norm": True}, r"lacks the tensor .*mamba\.norm"),
        ("falcon-h1-norm", {"mamba_rms_norm": False}, "tensors have no place"),
        ("falcon-h1-plain", {"partial_rotary_factor": 0.5}, "turns 6 values of 12"),
        ("falcon-h1-plain", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
        ("falcon-h1-plain", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("jamba-moe", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("jamba-moe", {"head_dim": 8}, "head_dim is 8"),
        ("jamba-moe", {"attn_layer_offset": 4}, "attn_layer_offset is 4"),
        ("jamba-moe", {"expert_layer_offset": "1"}, "expert_layer_offset is '1'"),
        ("jamba-moe", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ("jamba-moe", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("jamba-moe", {"num_experts": 1}, "tensors have no place"),
        ("jamba-dense", {"num_experts": 2}, r"lacks the tensor .*feed_forward\.router"),
    ],
)
def test_checkpoints_that_cannot_be_converted_get_a_sentence(tmp_path, name, changes, said):
    refused(edited(name, tmp_path, **changes), said, keelback.KeelbackError)


# ---- files


@pytest.mark.parametrize(
    ("name", "layers"), [("nemotron-q8", [2]), ("falcon-h1-bias", [0, 1]), ("jamba-q8", [1])]
)
def test_queries_keys_and_values_may_lie_in_one_matrix(tiny_file, tmp_path, name, layers):
    path, ids = tiny_file(name, "f32"), tiny.ids(name, 20)
    joined: dict[str, Any] = {}
    for i in layers:
        for end in ("weight", "bias")[: 2 if name == "falcon-h1-bias" else 1]:
            names = [f"blk.{i}.attn_{part}.{end}" for part in "qkv"]
            joined[f"blk.{i}.attn_qkv.{end}"] = np.concatenate([tensor(path, n) for n in names])
            joined |= dict.fromkeys(names)
    other = rewritten(path, tmp_path / "joined.gguf", {}, joined)
    np.testing.assert_allclose(logits(other, ids), logits(path, ids), rtol=0, atol=1e-5)


def test_layers_of_nemotron_that_guess_further_tokens_stay_unread(tiny_file, tmp_path):
    path, ids = tiny_file("nemotron-latent", "f32"), tiny.ids("nemotron-latent", 20)
    kinds = {
        "feed_forward_length": [0, 20, 0, 0, 20, 20],
        "attention.head_count_kv": [0, 0, 0, 2, 0, 2],
    }
    changes = {**kinds, "block_count": 6, "nextn_predict_layers": 1}
    spare = {f"blk.5.{name}.weight": np.ones((3, 4), "f4") for name in ("nextn.eh_proj", "attn_q")}
    keys = {f"nemotron_h_moe.{key}": value for key, value in changes.items()}
    other = rewritten(path, tmp_path / "mtp.gguf", keys, spare)
    assert np.array_equal(logits(other, ids), logits(path, ids))


def test_layers_of_nemotron_may_have_sizes_of_their_own(tiny_file, tmp_path):
    # As in Puzzle's files, and in those that have only one of the two names of eps.
    path, ids = tiny_file("nemotron-latent", "f32"), tiny.ids("nemotron-latent", 20)
    changes = {
        "expert_used_count": [0, 2, 0, 0, 2], "expert_feed_forward_length": [0, 20, 0, 0, 20],
        "attention.head_count": [0, 0, 0, 4, 0], "attention.layer_norm_rms_epsilon": None,
    }  # fmt: skip
    keys = {f"nemotron_h_moe.{key}": value for key, value in changes.items()}
    other = rewritten(path, tmp_path / "puzzle.gguf", keys, {})
    assert np.array_equal(logits(other, ids), logits(path, ids))


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("nemotron-latent", "feed_forward_length", [0, 20], "not 5 whole numbers"),
        ("nemotron-latent", "feed_forward_length", [0, 0, 0, 0, 20], r"blk\.1\.ssm_in"),
        ("nemotron-latent", "attention.head_count_kv", [0] * 5, r"blk\.3\.ssm_in"),
        ("nemotron-latent", "moe_latent_size", 24, r"blk\.1\.ffn_latent_down"),
        ("nemotron-latent", "moe_latent_size", None, r"blk\.1\.ffn_up_exps"),
        ("nemotron-latent", "expert_used_count", 5, "5 experts cannot be chosen from 8"),
        ("nemotron-latent", "expert_group_count", 3, "from 8 experts in 3"),
        ("nemotron-latent", "expert_count", 9, r"blk\.1\.ffn_gate_inp"),
        ("nemotron-latent", "expert_feed_forward_length", None, "lacks the key"),
        ("nemotron-latent", "nextn_predict_layers", 5, "nextn_predict_layers is 5"),
        ("falcon-h1-norm", "attention.key_length", 16, r"blk\.0\.attn_q"),
        ("falcon-h1-norm", "attention.head_count_kv", 3, r"blk\.0\.attn_k"),
        ("falcon-h1-norm", "rope.dimension_count", 14, "14 values"),
        ("falcon-h1-norm", "ssm.time_step_rank", 5, "a divisor of 72"),
        ("jamba-moe", "attention.head_count_kv", [0, 0, 0, 0], r"blk\.1\.ssm_in"),
        ("jamba-moe", "attention.head_count", 5, "a divisor of 48"),
        ("jamba-moe", "expert_used_count", 5, "5 experts cannot be chosen from 4"),
        ("jamba-moe", "ssm.time_step_rank", 3, r"blk\.0\.ssm_x"),
    ],
)
def test_files_whose_keys_do_not_fit_get_a_sentence(tiny_file, tmp_path, name, key, value, said):
    path = tiny_file(name, "f32")
    changes = {f"{GGUF(path).metadata['general.architecture']}.{key}": value}
    with pytest.raises(keelback.KeelbackError, match=said):
        logits(rewritten(path, tmp_path / "odd.gguf", changes, {}), np.array([1]))


@pytest.mark.parametrize(
    ("name", "missing"),
    [("nemotron-dense", "blk.0.ssm_norm.weight"), ("jamba-moe", "blk.0.ssm_b_norm.weight")],
)
def test_a_file_without_a_norm_is_refused_and_not_run_without(tiny_file, tmp_path, name, missing):
    path = rewritten(tiny_file(name, "f32"), tmp_path / "odd.gguf", {}, {missing: None})
    with pytest.raises(keelback.InvalidFile, match=missing.removesuffix(".weight")):
        logits(path, np.array([1]))
