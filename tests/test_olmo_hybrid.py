"""OLMo-Hybrid: its names, heads and convolutions, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import keelback
import tiny
from checkpoints import edited, refused
from keelback.convert import convert
from keelback.kernels.formats.gguf import GGUF
from rewriting import tensor
from tiny_files import raw, read, write_safetensors


def test_norms_get_names_by_what_they_do(tiny_file):
    path, hf = tiny_file("olmo-nope", "f32"), tiny.weights("olmo-nope")
    for gguf, theirs in {
        "blk.0.attn_norm": "0.attention_layer_norm",
        "blk.0.ffn_norm": "0.feedforward_layer_norm",
        "blk.1.post_attention_norm": "1.post_attention_layernorm",
        "blk.1.post_ffw_norm": "1.post_feedforward_layernorm",
        "blk.1.attn_q_norm": "1.self_attn.q_norm",
    }.items():
        assert np.array_equal(
            tensor(path, f"{gguf}.weight"), hf[f"model.layers.{theirs}.weight"]
        ), gguf


def test_heads_are_turned_where_config_names_an_angle_or_nothing(tiny_file, tmp_path: Path):
    turned = GGUF(tiny_file("olmo-rope", "f32")).metadata
    assert turned["olmo-hybrid.rope.freq_base"] == 300
    assert turned["olmo-hybrid.rope.dimension_count"] == 12
    assert turned["olmo-hybrid.attention.head_count_kv"].tolist() == [0, 0, 0, 2, 0]
    still = GGUF(tiny_file("olmo-nope", "f32")).metadata
    assert not [key for key in still if "rope" in key]
    folder = edited("olmo-nope", tmp_path, rope_parameters=..., rope_theta=...)
    silent = GGUF(convert(folder, tmp_path / "silent.gguf", "f32")).metadata
    assert silent["olmo-hybrid.rope.freq_base"] == 10000
    rope = {"rope_theta": None, "rope_type": "default"}
    folder = edited("olmo-nope", tmp_path / "null", rope_parameters=rope, rope_theta=...)
    null = GGUF(convert(folder, tmp_path / "null.gguf", "f32")).metadata
    assert not [key for key in null if "rope" in key]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("olmo-nope", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("olmo-nope", {"layer_types": ["linear_attention"]}, "does not name 3 layers"),
        ("olmo-nope", {"layer_types": None}, r"lacks the tensor model\.layers\.1\.attention_layer"),
        ("olmo-nope", {"num_key_value_heads": 2}, "num_attention_heads is 5"),
        ("olmo-nope", {"linear_num_key_heads": 3}, "linear_num_value_heads is 5"),
        ("olmo-nope", {"linear_value_head_dim": 28}, r"o_proj\.weight has the shape"),
        ("olmo-nope", {"linear_conv_kernel_dim": 3}, r"q_conv1d\.weight has the shape"),
        ("olmo-rope", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
    ],
)
def test_checkpoints_that_cannot_be_converted_get_a_sentence(tmp_path, name, changes, said):
    refused(edited(name, tmp_path, rope_theta=..., **changes), said, keelback.KeelbackError)


def test_a_convolution_cut_elsewhere_gets_a_sentence(tmp_path: Path):
    folder = tiny.write_checkpoint("olmo-nope", tmp_path / "cut")
    tensors, name = tiny.stored("olmo-nope"), "model.layers.0.linear_attn.q_conv1d.weight"
    values = read(tensors[name])
    tensors[name] = raw(np.concatenate([values, values[:1]]))
    write_safetensors(folder / "model.safetensors", tensors)
    said = re.escape("q_conv1d.weight has the shape [71, 1, 4]")
    refused(folder, said, keelback.KeelbackError)
