"""Gated DeltaNet with layers of attention: what the file says of them, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import keelback
import tiny
from checkpoints import edited, refused
from keelback.kernels.formats.gguf import GGUF
from rewriting import logits, rewritten, tensor


def test_a_file_says_of_every_layer_how_it_attends(tiny_file):
    metadata = GGUF(tiny_file("gdn-attns", "f32")).metadata
    attention = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in metadata.items()
        if key.startswith(("gated-deltanet.attention", "gated-deltanet.rope"))
    }
    assert attention == {
        "gated-deltanet.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "gated-deltanet.attention.head_count": [6, 0, 4, 0],
        "gated-deltanet.attention.head_count_kv": [3, 0, 4, 0],
        "gated-deltanet.attention.sliding_window": 12,
        "gated-deltanet.attention.sliding_window_pattern": [False, False, True, False],
        "gated-deltanet.rope.freq_base": 300.0,
    }


def test_queries_keys_and_values_in_one_matrix_give_the_same_bits(tiny_file, tmp_path):
    path, ids = tiny_file("gdn-attn", "f32"), tiny.ids("gdn-attn", 20)
    joined = {}
    for end in ("weight", "bias"):
        names = [f"blk.1.attn_{part}.{end}" for part in "qkv"]
        joined[f"blk.1.attn_qkv.{end}"] = np.concatenate([tensor(path, name) for name in names])
        joined |= dict.fromkeys(names)
    other = rewritten(path, tmp_path / "joined.gguf", {}, joined)
    assert np.array_equal(logits(other, ids), logits(path, ids))


@pytest.mark.parametrize(
    ("name", "attn", "said"),
    [
        ("gdn-attn", {"num_heads": 4}, "attn names no list of layers"),
        ("gdn-attn", {"layers": ["1"], "num_heads": 4}, "attn names no list of layers"),
        ("gdn-attn", "global", "attn names no list of layers"),
        ("gdn-attn", {"layers": [3], "num_heads": 4}, "attn names layer 3 of 3"),
        ("gdn-attn", {"layers": [1, 1], "num_heads": 4}, "or names it twice"),
        ("gdn-attn", {"layers": [1]}, r"lacks the key attn\.num_heads"),
        (
            "gdn-attn",
            {"layers": [1], "num_heads": 4, "num_kv_heads": 3},
            r"attn\.num_heads is 4, not a multiple of attn\.num_kv_heads 3",
        ),
        ("gdn-attn", {"layers": [1], "num_heads": 8}, "8 heads of attn"),
        ("gdn-attn", {"layers": [1], "num_heads": 4, "window_size": 0}, "window_size is 0"),
        ("gdn-attn", {"layers": [1], "num_heads": 2}, r"k_proj\.weight has the shape"),
        (
            "gdn-attns",
            [{"layers": [0], "num_heads": 6}, {"layers": [2], "num_heads": 4, "rope_theta": 3.0}],
            "several values of rope_theta",
        ),
        ("gdn-gate", {"layers": [0], "num_heads": 2}, r"q_proj\.weight has the shape"),
    ],
)
def test_checkpoints_that_cannot_be_converted_get_a_sentence(tmp_path, name, attn, said):
    refused(edited(name, tmp_path, attn=attn), said, keelback.KeelbackError)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attention.head_count_kv", [0, 3, 0], r"blk\.1\.attn_k"),
        ("attention.head_count_kv", None, r"lacks the tensor blk\.1\.attn_qkv"),
        ("attention.head_count", [0, 0, 0], "head_count is 0, not a whole number above zero"),
        ("attention.sliding_window_pattern", [1, 0, 1], "3 times true or false"),
    ],
)
def test_files_whose_keys_do_not_fit_get_a_sentence(tiny_file, tmp_path, key, value, said):
    changes = {f"gated-deltanet.{key}": value}
    path = rewritten(tiny_file("gdn-attn", "f32"), tmp_path / "odd.gguf", changes, {})
    with pytest.raises(keelback.KeelbackError, match=said):
        logits(path, np.array([1]))
