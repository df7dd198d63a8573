"""LFM2: its names, llama.cpp's fused tensors, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import keelback
import tiny
from checkpoints import edited, refused
from keelback.convert import convert
from keelback.kernels.formats.gguf import GGUF
from rewriting import logits, rewritten, tensor


def test_gates_stand_above_values_and_the_last_norm_has_its_name(tiny_file):
    path, hf = tiny_file("lfm2-dense", "f32"), tiny.weights("lfm2-dense")
    at = "model.layers.0.feed_forward."
    for part, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        assert np.array_equal(tensor(path, f"blk.0.ffn_{part}.weight"), hf[f"{at}{theirs}.weight"])
    last = tensor(path, "token_embd_norm.weight")
    assert np.array_equal(last, hf["model.embedding_norm.weight"])


def test_fused_tensors_of_llamacpp_give_the_same_bits(tiny_file, tmp_path):
    path, ids = tiny_file("lfm2moe-bias", "f32"), tiny.ids("lfm2moe-bias", 20)
    changed: dict[str, Any] = {}
    for i in (1, 3):
        names = [f"blk.{i}.attn_{part}.weight" for part in "qkv"]
        changed[f"blk.{i}.attn_qkv.weight"] = np.concatenate([tensor(path, n) for n in names])
        changed |= dict.fromkeys(names)
    names = [f"blk.2.ffn_{part}_exps.weight" for part in ("gate", "up")]
    both = np.concatenate([tensor(path, name) for name in names], axis=1)
    changed |= dict.fromkeys(names) | {"blk.2.ffn_gate_up_exps.weight": both}
    other = rewritten(path, tmp_path / "fused.gguf", {}, changed)
    assert np.array_equal(logits(other, ids), logits(path, ids))


def test_a_sliding_window_hides_what_lies_before_it(tiny_file, tmp_path):
    # lfm2-dense attends in one layer, behind and before a convolution of three taps.
    path, ids = tiny_file("lfm2-dense", "f32"), tiny.ids("lfm2-dense", 20)
    whole, key = logits(path, ids), "lfm2.attention.sliding_window"
    wide, narrow = (
        logits(rewritten(path, tmp_path / f"{n}.gguf", {key: n}, {}), ids) for n in (20, 5)
    )
    assert np.array_equal(wide, whole)
    assert np.array_equal(narrow[:5], whole[:5]) and not np.allclose(narrow[5], whole[5])


def test_what_llamacpp_takes_otherwise_is_said(tmp_path):
    said: list[str] = []
    folder = tiny.write_checkpoint("lfm2moe-plain", tmp_path / "plain")
    path = convert(folder, tmp_path / "out.gguf", "f32", said.append)
    assert GGUF(path).metadata["lfm2moe.expert_weights_scale"] == np.float32(1.7)
    remarks = " ".join(text for text in said if text.startswith("for keelback only: "))
    assert "expert_weights_scale is 1.7" in remarks
    assert "expert_weights_norm is False" in remarks
    assert "4 heads of 16 do not make the hidden size 48" in remarks


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("lfm2-dense", {"layer_types": ["conv", "attention", "conv"]}, "names 'attention'"),
        ("lfm2-dense", {"layer_types": ["conv"]}, "does not name 3 layers"),
        ("lfm2-dense", {"is_causal": False}, "is_causal is false"),
        (
            "lfm2-dense",
            {"tie_word_embeddings": None, "tie_embedding": False},
            r"lacks the tensor lm_head\.weight",
        ),
        ("lfm2-dense", {"num_key_value_heads": 2}, "num_attention_heads is 5"),
        ("lfm2-dense", {"conv_L_cache": 4}, r"conv\.conv\.weight has the shape"),
        ("lfm2-dense", {"layer_types": None}, r"lacks the tensor model\.layers\.0\.self_attn"),
        ("lfm2-dense", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
        ("lfm2-adjusted", {"full_attn_idxs": ["0"]}, "no list of whole numbers"),
        ("lfm2moe-bias", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ("lfm2moe-bias", {"num_dense_layers": -1}, "num_dense_layers is -1"),
        ("lfm2moe-bias", {"use_expert_bias": False}, r"1\.feed_forward\.expert_bias among them"),
        ("lfm2moe-plain", {"use_expert_bias": True}, r"lacks the tensor .*expert_bias"),
    ],
)
def test_checkpoints_that_cannot_be_converted_get_a_sentence(tmp_path, name, changes, said):
    refused(edited(name, tmp_path, **changes), said, keelback.KeelbackError)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attention.head_count_kv", [0, 4, 0, 4], r"blk\.1\.attn_k"),
        ("attention.head_count_kv", [0, 0, 0, 0], r"lacks the tensor blk\.1\.shortconv\.in_proj"),
        ("attention.head_count", 7, "a divisor of 40"),
        # That a key may be missing does not make its zero right.
        ("attention.key_length", 0, r"key_length is 0, not a whole number from 1"),
        (
            "attention.sliding_window",
            1 << 25,
            r"sliding_window is 33554432, not a whole number from 0",
        ),
        ("shortconv.l_cache", 4, r"blk\.0\.shortconv\.conv"),
        ("shortconv.l_cache", None, r"lacks the key lfm2moe\.shortconv\.l_cache"),
        ("expert_used_count", 9, "9 experts cannot be chosen from 8"),
        ("rope.dimension_count", 10, "10 values"),
    ],
)
def test_files_whose_keys_do_not_fit_get_a_sentence(tiny_file, tmp_path, key, value, said):
    path = rewritten(
        tiny_file("lfm2moe-bias", "f32"), tmp_path / "odd.gguf", {f"lfm2moe.{key}": value}, {}
    )
    with pytest.raises(keelback.KeelbackError, match=said):
        logits(path, np.array([1]))
