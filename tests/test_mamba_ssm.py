"""Models of mamba_ssm with attention and MLPs, against its equations; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keelback
import mamba_ssm_reference as reference
import tiny
import tiny_files
from checkpoints import refused
from distances import row_errors
from keelback.convert import convert
from keelback.kernels.formats.gguf import GGUF

TOLERANCE = 2e-5

_COMMON: dict[str, Any] = {
    "d_model": 32, "n_layer": 3, "vocab_size": 56, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": False,
}  # fmt: skip
_SECOND = {"layer": "Mamba2", "headdim": 8, "d_state": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    # As state-spaces/mamba2attn-2.7b: heads that make more than d_model, turned in part.
    "mamba2attn": _COMMON | {
        "ssm_cfg": _SECOND, "attn_layer_idx": [1], "d_intermediate": 0,
        "attn_cfg": {
            "causal": True, "d_conv": 4, "head_dim": 16, "num_heads": 3, "out_proj_bias": False,
            "qkv_proj_bias": False, "rotary_emb_dim": 8,
        },
    },
    # What a silent config stands for: biases, no convolution, heads as they are.
    "mamba2 with MLPs": _COMMON | {
        "ssm_cfg": _SECOND, "attn_layer_idx": [0, 2, 9], "d_intermediate": 100,
        "attn_cfg": {"causal": True, "num_heads": 4, "num_heads_kv": 2, "softmax_scale": 0.3},
    },
    "mamba with both": _COMMON | {
        "ssm_cfg": {"d_state": 8}, "attn_layer_idx": [2], "d_intermediate": 130,
        "attn_cfg": {
            "causal": True, "num_heads": 4, "num_heads_kv": 1, "d_conv": 3, "rotary_emb_dim": 8,
            "rotary_emb_base": 300.0,
        },
    },
    "mamba with MLPs alone": _COMMON | {"ssm_cfg": {"d_state": 8}, "d_intermediate": 128},
}  # fmt: skip


def weights(name: str) -> dict[str, np.ndarray]:
    """Random tensors; those at the ends of branches are small, as in other tiny checkpoints."""
    variant = tiny.Variant(name, "mamba2", CONFIGS[name], gain={"fc2": 0.25})
    return {key: tiny.draw(variant, key, shape) for key, shape in reference.shapes(CONFIGS[name])}


def written(name: str, folder: Path, **changes: Any) -> Path:
    """The checkpoint as mamba_ssm writes it, with other values in its config."""
    tiny.write_config(folder, CONFIGS[name] | changes)
    tensors = {key: tiny_files.raw(values) for key, values in weights(name).items()}
    tiny_files.write_torch(folder / "pytorch_model.bin", tensors)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A name of CONFIGS and the file of that model."""
    folder = tmp_path_factory.mktemp("mamba_ssm")
    path = convert(written(request.param, folder / "m"), folder / "m.gguf", "f32")
    return request.param, path


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_logits_are_those_of_the_equations(converted, backend: str):
    name, path = converted
    ids = np.random.RandomState(7).randint(0, 56, 40)
    wanted = reference.logits(CONFIGS[name], weights(name), ids)
    kept = {"cache_type_k": "f32", "cache_type_v": "f32"}
    model = keelback.Model(path, backend=backend, notice=lambda text: None, **kept)
    at_once, _ = model.forward(ids, logits="all")
    state, rows = model.new_state(), []
    for token in ids:
        row, state = model.forward([int(token)], state)
        rows.append(row)
    for got in (at_once, np.stack(rows)):
        assert row_errors(got, wanted).max() < TOLERANCE


def test_keys_say_where_attention_is_and_how(tmp_path: Path):
    said: list[str] = []
    folder = written("mamba2attn", tmp_path / "m")
    metadata = GGUF(convert(folder, tmp_path / "m.gguf", "f32", said.append)).metadata
    wanted = {
        "attention.head_count": [0, 3, 0], "attention.head_count_kv": [0, 3, 0],
        "attention.key_length": 16, "shortconv.l_cache": 4, "rope.dimension_count": 8,
        "feed_forward_length": 0,
    }  # fmt: skip
    for key, value in wanted.items():
        got = metadata[f"mamba2.{key}"]
        assert (got.tolist() if isinstance(value, list) else got) == value, key
    assert any("for keelback only" in text and "attention" in text for text in said)


def attention(**changes: Any) -> dict[str, Any]:
    return {"attn_cfg": CONFIGS["mamba2attn"]["attn_cfg"] | changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attn_layer_idx": [0, 1]}, r"layers\.0\.mixer\.in_proj\.weight has the shape"),
        ({"attn_layer_idx": []}, r"layers\.1\.mixer\.in_proj\.weight has the shape"),
        ({"attn_layer_idx": ["1"]}, "attn_layer_idx is no list of whole numbers"),
        ({"attn_cfg": [1]}, "attn_cfg is no object"),
        ({"attn_cfg": {}}, r"attn_cfg\.causal is not true"),
        ({"attn_cfg": {"causal": True}}, r"lacks the key attn_cfg\.num_heads"),
        (attention(causal=False), r"attn_cfg\.causal is not true"),
        (attention(mlp_dim=256), r"attn_cfg\.mlp_dim is 256; keelback runs models without it"),
        (attention(rotary_emb_interleaved=True), "rotary_emb_interleaved is True"),
        (attention(rotary_emb_dim=18), r"rotary_emb_dim is 18, which is no even part of heads"),
        (attention(num_heads_kv=2), r"num_heads is 3, not a multiple of attn_cfg\.num_heads_kv 2"),
        (attention(d_conv=0), r"conv1d\.\w+ among them"),
        (attention(softmax_scale=-1), r"attn_cfg\.softmax_scale is -1"),
        ({"d_intermediate": 64}, r"lacks the tensor backbone\.layers\.0\.norm2"),
        ({"d_intermediate": -1}, "d_intermediate is -1"),
    ],
)
def test_checkpoints_that_cannot_be_converted_get_a_sentence(tmp_path: Path, changes, said):
    refused(written("mamba2attn", tmp_path / "m", **changes), said, keelback.KeelbackError)
