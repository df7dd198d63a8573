"""The converter: names, types and transforms, and checkpoints that are refused with a sentence."""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import keelback
import tiny
import tiny_files
from checkpoints import edit, edited, refused
from keelback.convert import convert
from keelback.convert import write as writing
from keelback.convert.mixture import FILE_TYPES
from keelback.kernels import files
from keelback.kernels.formats import blocks
from keelback.kernels.formats.gguf import GGUF


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.write_checkpoint("mamba-tied", tmp_path / "mamba-tied")


def values(file: GGUF, name: str) -> np.ndarray:
    info = file.tensors[name]
    return blocks.dequantize(file.data(info), info.block, info.shape)


def test_mamba_is_written_as_llama_cpp_writes_it(tiny_file):
    file = GGUF(tiny_file("mamba-untied", "f16"))
    weights, config = tiny.weights("mamba-untied"), tiny.VARIANTS["mamba-untied"].config
    d_model, d_inner, rank = (
        config["hidden_size"],
        2 * config["hidden_size"],
        config["time_step_rank"],
    )
    expected = {
        "general.architecture": "mamba", "mamba.context_length": 1 << 20,
        "mamba.embedding_length": d_model,
        "mamba.block_count": config["num_hidden_layers"], "mamba.feed_forward_length": 0,
        "mamba.attention.head_count": 0, "mamba.ssm.conv_kernel": config["conv_kernel"],
        "mamba.ssm.inner_size": d_inner, "mamba.ssm.state_size": config["state_size"],
        "mamba.ssm.time_step_rank": rank, "mamba.ssm.dt_b_c_rms": False, "general.file_type": 1,
        "tokenizer.ggml.model": "none",
    }  # fmt: skip
    assert {key: file.metadata[key] for key in expected} == expected
    layer = "backbone.layers.0.mixer"
    assert np.allclose(values(file, "blk.0.ssm_a"), -np.exp(weights[f"{layer}.A_log"]), rtol=1e-6)
    assert (
        values(file, "blk.0.ssm_conv1d.weight") == weights[f"{layer}.conv1d.weight"][:, 0]
    ).all()
    f32 = {
        "ssm_a",
        "ssm_d",
        "ssm_conv1d.weight",
        "ssm_conv1d.bias",
        "ssm_dt.bias",
        "attn_norm.weight",
    }
    for name in ("ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight", *f32):
        assert file.tensors[f"blk.0.{name}"].block.name == ("F32" if name in f32 else "F16")


def test_mamba2_has_unit_axes_and_grouped_norms(tiny_file):
    file = GGUF(tiny_file("mamba2-g2", "f32"))
    config = tiny.VARIANTS["mamba2-g2"].config
    heads, groups = config["num_heads"], config["n_groups"]
    assert file.tensors["blk.0.ssm_a"].shape == file.tensors["blk.0.ssm_d"].shape == (heads, 1)
    assert file.tensors["blk.0.ssm_norm.weight"].shape == (
        groups,
        heads * config["head_dim"] // groups,
    )
    assert file.metadata["mamba2.ssm.time_step_rank"] == heads


def test_value_heads_of_gated_deltanet_are_tiled(tiny_file):
    file, weights = GGUF(tiny_file("gdn-gva", "f32")), tiny.weights("gdn-gva")
    config = tiny.VARIANTS["gdn-gva"].config
    key_heads, heads = config["num_heads"], config["num_v_heads"]
    grouped = -np.exp(weights["model.layers.0.attn.A_log"])
    tiled = [grouped[(j % key_heads) * (heads // key_heads) + j // key_heads] for j in range(heads)]
    assert np.allclose(values(file, "blk.0.ssm_a"), tiled, rtol=1e-6)


def test_rows_that_do_not_divide_into_blocks_stay_f16(tiny_file):
    file = GGUF(tiny_file("mamba-q8", "q8_0"))
    assert file.tensors["blk.0.ssm_in.weight"].block.name == "Q8_0"
    assert file.tensors["blk.0.ssm_dt.weight"].block.name == "F16"


def test_auto_keeps_the_precision_of_the_checkpoint(tiny_file):
    for name, kind in (("mamba-tied", "F32"), ("mamba-f16", "F16"), ("gdn-bf16", "BF16")):
        assert GGUF(tiny_file(name, "auto")).tensors["token_embd.weight"].block.name == kind


def test_numbers_of_eight_bytes_become_those_of_four(checkpoint: Path, tmp_path: Path):
    weights = {name: tiny_files.raw(x, "F64") for name, x in tiny.weights("mamba-tied").items()}
    tiny_files.write_safetensors(checkpoint / "model.safetensors", weights)
    file = GGUF(convert(checkpoint, tmp_path / "m.gguf"))
    stored = file.data(file.tensors["token_embd.weight"]).view(np.float32)
    wanted = tiny.weights("mamba-tied")["backbone.embeddings.weight"]
    assert np.array_equal(stored, wanted.reshape(-1))
    huge = np.full(wanted.shape, 1e300)
    weights["backbone.embeddings.weight"] = tiny_files.Raw("F64", huge.shape, huge.tobytes())
    tiny_files.write_safetensors(checkpoint / "model.safetensors", weights)
    with warnings.catch_warnings(action="error"), pytest.raises(keelback.InvalidFile, match="fini"):
        convert(checkpoint, tmp_path / "m.gguf")


def test_what_llama_cpp_has_no_slot_for_is_said(tmp_path: Path):
    said: list[str] = []
    convert(
        tiny.write_checkpoint("mamba-bias", tmp_path / "b"), tmp_path / "b.gguf", notice=said.append
    )
    assert sum("keelback only" in text and "ssm_in.bias" in text for text in said) == 1
    assert sum("no tokenizer" in text for text in said) == 1


def test_sampling_defaults_travel(checkpoint: Path, tmp_path: Path):
    (checkpoint / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20, "top_p": 0.9}'
    )
    path = convert(checkpoint, tmp_path / "m.gguf")
    sampling = keelback.Session(keelback.load(path)).sampling
    assert (round(sampling.temperature, 6), sampling.top_k, round(sampling.top_p, 6)) == (
        0.6,
        20,
        0.9,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "unheard_of"}, "model_type 'unheard_of' is not known"),
        ({"model_type": ..., "architectures": ...}, "model_type None is not known"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized already \(gptq\)"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": ...}, "lacks the key hidden_size"),
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"hidden_size": 48, "intermediate_size": 96}, "do not belong together"),
        ({"num_hidden_layers": 9}, r"lacks the tensor backbone\.layers\.2"),
        ({"state_size": "many"}, "state_size is 'many'"),
    ],
)
def test_checkpoints_that_cannot_be_converted_get_a_sentence(checkpoint, changes, said):
    refused(edit(checkpoint, **changes), said, keelback.KeelbackError)


@pytest.mark.parametrize("expand", [1 << 70, 1e9])
def test_sizes_that_no_tensor_has_are_refused_before_they_are_used(tmp_path: Path, expand: float):
    folder = edited("gdn-gate", tmp_path, expand_v=expand)
    refused(folder, r"o_proj\.weight has the shape", keelback.InvalidFile)


def test_folders_that_are_no_checkpoint_get_a_sentence(checkpoint: Path, tmp_path: Path):
    with pytest.raises(keelback.InvalidFile, match="is no folder"):
        convert(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(keelback.InvalidFile, match=r"no config\.json"):
        convert(empty)
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(keelback.UnsupportedModel, match="adapter"):
        convert(empty)
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(keelback.UnsupportedModel, match=r"\.bin"):
        convert(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(keelback.InvalidFile, match="cannot be read as JSON"):
        convert(checkpoint)


@pytest.mark.parametrize("length", [0, 7, 40, 2000, -100])
def test_truncated_weights_get_a_sentence(checkpoint: Path, tmp_path: Path, length: int):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(keelback.InvalidFile, match=r"model\.safetensors"):
        convert(checkpoint, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../secret.safetensors", r"no \.safetensors file there"),
        ("a\0b.safetensors", r"no \.safetensors file there"),
        ("\ud800.safetensors", r"no \.safetensors file there"),
        ("a" * 300 + ".safetensors", "File name too long"),
        ("gone.safetensors", r"gone\.safetensors is missing"),
    ],
)
def test_an_index_that_names_no_file_of_its_folder_is_refused(tmp_path: Path, name: str, said: str):
    folder = tiny.write_checkpoint("mamba2-sharded", tmp_path / "sharded")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)
    index.write_text(json.dumps(content))
    with pytest.raises(keelback.InvalidFile, match=said):
        convert(folder, tmp_path / "out.gguf")


def test_a_failing_conversion_leaves_the_old_file_and_nothing_else(
    checkpoint, tmp_path, monkeypatch
):
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, target, progress=interrupt)
    monkeypatch.setattr(
        files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(keelback.InvalidInput, match="No space left"):
        convert(checkpoint, target)
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mamba-tied", "model.gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="measures resident memory as Linux counts it")
def test_conversion_streams_tensor_by_tensor(tmp_path: Path):
    """A checkpoint of 96 MB in tensors of 16 MB takes far less memory than its size."""
    folder, rows = tmp_path / "big", 4096
    folder.mkdir()
    shapes = {f"t{i}": (rows, 1024) for i in range(6)}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    (folder / "config.json").write_text('{"model_type": "none"}')

    from keelback.convert.checkpoint import Checkpoint
    from keelback.convert.plan import Plan

    source = Checkpoint(folder)
    plan = Plan("toy", {})
    for name, shape in shapes.items():
        plan.add(f"{name}.weight", shape, source.require(name, *shape))
    seen = []
    writing.write_gguf(
        tmp_path / "big.gguf",
        plan,
        {},
        FILE_TYPES["Q8_0"],
        lambda done, total: seen.append(traced()),
    )
    assert max(seen) - min(seen) < 48 << 20


def traced() -> int:
    """Anonymous memory in use: mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1}, "10 tensors have no place"),
        ({"hidden_size": 1 << 40}, "hidden_size is 1099511627776"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf"),
        ({"conv_kernel": [4]}, r"conv_kernel is \[4\]"),
    ],
)
def test_configs_that_do_not_describe_the_weights_are_refused(checkpoint, changes, said):
    refused(edit(checkpoint, **changes), said, keelback.KeelbackError)


def rewrite(folder: Path, **tensors: np.ndarray) -> Path:
    """Put float32 tensors into a checkpoint, in place of those of the same name."""
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path)
    return folder


def test_values_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path):
    name = "backbone.layers.0.mixer.in_proj.weight"
    matrix = np.zeros_like(tiny.weights("mamba-tied")[name])
    matrix[3, 5] = 1e6
    with pytest.raises(keelback.InvalidFile, match=r"blk\.0\.ssm_in\.weight is too large for F16"):
        convert(rewrite(checkpoint, **{name: matrix}), tmp_path / "out.gguf", "f16")
    convert(checkpoint, tmp_path / "out.gguf", "bf16")
    matrix[3, 5] = np.nan
    with pytest.raises(keelback.InvalidFile, match=r"blk\.0\.ssm_in\.weight are not finite"):
        convert(rewrite(checkpoint, **{name: matrix}), tmp_path / "nan.gguf")
    assert not (tmp_path / "nan.gguf").exists()


def test_misshapen_and_superfluous_tensors_are_named(tmp_path: Path):
    folder = tiny.write_checkpoint("gdn-gate", tmp_path / "gdn")
    name = "model.layers.1.attn.g_proj.weight"
    turned = np.ascontiguousarray(tiny.weights("gdn-gate")[name].T)
    with pytest.raises(
        keelback.InvalidFile, match=r"layers\.1\.attn\.g_proj\.weight has the shape"
    ):
        convert(rewrite(folder, **{name: turned}), tmp_path / "out.gguf")
    folder = tiny.write_checkpoint("gdn-gate", tmp_path / "gdn2")
    rewrite(folder, **{"model.layers.0.attn.o_proj.bias": np.zeros(40, np.float32)})
    with pytest.raises(keelback.UnsupportedModel, match=r"o_proj\.bias"):
        convert(folder, tmp_path / "out.gguf")
    folder = tiny.write_checkpoint("gdn-gate", tmp_path / "gdn3")
    convert(rewrite(folder, **{"x.position_ids": np.arange(4)}), tmp_path / "out.gguf")


def test_the_target_is_never_a_device_or_the_checkpoint_itself(checkpoint: Path, tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path, tmp_path / "fifo", Path("/dev/null"), tmp_path / "no" / "out.gguf"):
        with pytest.raises(keelback.InvalidInput, match=str(target)):
            convert(checkpoint, target)
    (tmp_path / "weights").symlink_to(checkpoint / "model.safetensors")
    for target in (
        checkpoint / "model.safetensors",
        tmp_path / "weights",
        checkpoint / "config.json",
    ):
        with pytest.raises(keelback.InvalidInput, match="part of the checkpoint"):
            convert(checkpoint, target)
    for _ in range(2):
        convert(checkpoint, checkpoint / "beside.gguf")
    link = tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "real.gguf")
    convert(checkpoint, link)
    assert link.is_symlink() and GGUF(tmp_path / "real.gguf").tensors


def test_sampling_defaults_that_make_no_sense_are_left_out_with_a_notice(checkpoint, tmp_path):
    (checkpoint / "generation_config.json").write_text(
        '{"top_k": -1, "temperature": NaN, "min_p": "x", "repetition_penalty": 1.1}'
    )
    said: list[str] = []
    path = convert(checkpoint, tmp_path / "m.gguf", notice=said.append)
    assert sum("is left out" in text for text in said) == 3
    assert round(keelback.Session(keelback.load(path)).sampling.repeat_penalty, 5) == 1.1


def test_a_pipe_in_place_of_weights_is_not_waited_for(checkpoint: Path, tmp_path: Path):
    weights = checkpoint / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(keelback.InvalidFile, match="no ordinary file"):
        convert(checkpoint, tmp_path / "out.gguf")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": {"__float__": [1]}}', "[]", "\udc80"])
def test_json_that_is_none_gets_a_sentence(checkpoint: Path, text: str):
    (checkpoint / "config.json").write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(keelback.InvalidFile, match=r"config\.json"):
        convert(checkpoint)
