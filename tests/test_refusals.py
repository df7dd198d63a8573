"""What is given to the converter and is no checkpoint, or none that it can convert: a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import keelback
import tiny
import tiny_files
import tiny_layouts
from checkpoints import edit, edited, refused
from keelback.convert import convert
from keelback.convert.checkpoint import Checkpoint
from keelback.convert.location import title

FOUR_BITS = {"type": "int", "num_bits": 4, "strategy": "group"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.write_checkpoint("mamba-tied", tmp_path / "mamba-tied")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "eetq"}, "eetq"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": FOUR_BITS}},
            },
            "compressed-tensors pack-quantized",
        ),
        ({"group_size": 64, "bits": 4}, "MLX"),
        ("int8", "int8"),
    ],
)
def test_a_config_that_says_quantized_is_refused(checkpoint: Path, how: object, said: str):
    refused(edit(checkpoint, quantization_config=how), rf"quantized already \({said}\).*--outtype")
    # MLX's key, and the inner config of a model of several kinds of input.
    refused(edit(checkpoint, quantization_config=..., quantization=how), "quantized already")
    inner = {"model_type": "mamba", "quantization_config": how}
    refused(edit(checkpoint, quantization=..., text_config=inner), "quantized already")


@pytest.mark.parametrize(
    ("end", "method"),
    [
        ("qweight", "GPTQ or AWQ"), ("weight.absmax", "bitsandbytes"), ("SCB", "bitsandbytes"),
        ("biases", "MLX"), ("W_q", "HQQ"), ("codebooks", "AQLM"),
        ("weight_packed", "compressed-tensors"), ("weight_scale_2", "NVFP4"),
    ],
)  # fmt: skip
def test_tensors_that_say_quantized_are_refused(checkpoint: Path, end: str, method: str):
    tensors = tiny.stored("mamba-tied")
    tensors[f"backbone.layers.0.mixer.in_proj.{end}"] = tiny_files.Raw("U8", (4,), bytes(4))
    tiny_files.write_safetensors(checkpoint / "model.safetensors", tensors)
    refused(checkpoint, rf"quantized already \({method}\)")


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        (5, keelback.InvalidFile, r"model\.safetensors is damaged"),
        (None, keelback.InvalidFile, r"model\.safetensors is damaged"),
        ("F8_E4M3FNUZ", keelback.UnsupportedModel, "in_proj.weight has the type F8_E4M3FNUZ"),
    ],
)
def test_numbers_of_a_type_that_cannot_be_read_are_refused(checkpoint, kind, error, said):
    tensors, name = tiny.stored("mamba-tied"), "backbone.layers.0.mixer.in_proj.weight"
    matrix = tensors[name]
    tensors[name] = tiny_files.Raw(kind, matrix.shape, matrix.data)
    tensors[f"{name}_scale"] = tiny_files.raw(np.ones(1, np.float32))
    tiny_files.write_safetensors(checkpoint / "model.safetensors", tensors)
    refused(checkpoint, said, error)


@pytest.mark.parametrize(
    ("name", "content", "method"),
    [
        ("quantize_config.json", "{}", "GPTQ"),
        ("quant_config.json", "{}", "AWQ"),
        ("hf_quant_config.json", '{"quantization": {"quant_algo": "W4A8_AWQ"}}', "modelopt"),
    ],
)
def test_files_that_say_quantized_are_refused(checkpoint: Path, name: str, content: str, method):
    (checkpoint / name).write_text(content)
    refused(checkpoint, rf"quantized already \({method}\)")


@pytest.mark.parametrize("block", [[128], [0, 128], ["a", "b"], 128, [1 << 40, 1]])
def test_float8_blocks_of_no_size_are_refused(checkpoint: Path, block: object):
    how = {"quant_method": "fp8", "weight_block_size": block}
    refused(edit(checkpoint, quantization_config=how), "float8 blocks", keelback.InvalidFile)


def test_float8_numbers_without_their_factors_are_refused(tmp_path: Path):
    path = tiny_layouts.write(tiny_layouts.LAYOUTS["fp8, blocks"], tmp_path / "fp8")
    weights = path / "model.safetensors"
    tensors = tiny.stored("mamba2-float8")
    name = "backbone.layers.1.mixer.in_proj.weight"
    tensors[name], _ = tiny_files.float8(tiny_files.read(tensors[name]), (16, 12))
    tiny_files.write_safetensors(weights, tensors)
    refused(path, f"lacks the factors of the float8 tensor {name}", keelback.InvalidFile)


# The first has as many blocks as the matrix has rows, the second blocks wider than any matrix.
@pytest.mark.parametrize("block", [(2, 20), (2, 1 << 24)])
def test_float8_factors_are_told_apart_by_their_shape(checkpoint: Path, block: tuple[int, int]):
    tensors, name = tiny.stored("mamba-tied"), "backbone.layers.0.mixer.in_proj.weight"
    values = tiny_files.read(tensors[name])
    tensors[name], factors = tiny_files.float8(values, block)
    tensors[f"{name}_scale_inv"] = tiny_files.raw(factors)
    tiny_files.write_safetensors(checkpoint / "model.safetensors", tensors)
    edit(checkpoint, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    assert values.shape[0] == 2 * len(factors)
    source = Checkpoint(checkpoint).require(name.replace("backbone.", "model."))
    assert np.array_equal(source.read(), tiny_files.dequantized(tensors[name], factors, block))
    assert source.block[1] <= values.shape[1]


@pytest.mark.parametrize(
    ("layout", "changes", "said"),
    [
        ("transformers 5", {"num_hidden_layers": 9}, r"lacks the tensor backbone\.layers\.2\.norm"),
        (
            "mamba_ssm",
            {"d_model": 41},
            r"\.safetensors: tensor backbone\.embedding\.weight has the",
        ),
        ("mamba_ssm", {"n_layer": 9}, r"lacks the tensor backbone\.layers\.2\.norm\.weight"),
        ("below", {"num_hidden_layers": 9}, r"lacks the tensor model\.language_model\.layers\.2\."),
        (
            "below",
            {"hidden_size": 41},
            r"\.safetensors: tensor model\.language_model\.embeddings\.",
        ),
        (
            "below",
            {"num_hidden_layers": 1},
            r"place .*, model\.language_model\.layers\.1\.mixer\.A_",
        ),
    ],
)
def test_tensors_are_named_as_the_file_names_them(checkpoint, layout: str, changes, said: str):
    tensors = tiny.stored("mamba-tied")
    if layout == "mamba_ssm":
        tensors = {name.replace("embeddings", "embedding"): t for name, t in tensors.items()}
        tiny.write_config(checkpoint, MAMBA_SSM)
    if layout == "below":
        tensors = {
            name.replace("backbone", "model.language_model"): t for name, t in tensors.items()
        }
    tiny_files.write_safetensors(checkpoint / "model.safetensors", tensors)
    refused(edit(checkpoint, **changes), said, keelback.KeelbackError)


def test_an_output_matrix_that_config_promises_has_to_be_there(checkpoint: Path):
    refused(
        edit(checkpoint, tie_word_embeddings=False),
        "lacks the tensor lm_head.weight",
        keelback.InvalidFile,
    )
    theirs = tiny.VARIANTS["mamba-tied"].config
    tiny.write_config(checkpoint, MAMBA_SSM | {"tie_embeddings": False})
    refused(checkpoint, "lacks the tensor lm_head.weight", keelback.InvalidFile)
    wrapper = {"model_type": "some_vl", "tie_word_embeddings": False}
    tiny.write_config(checkpoint, wrapper | {"text_config": theirs | {"tie_word_embeddings": None}})
    assert convert(checkpoint, checkpoint.parent / "m.gguf").is_file()


def test_adapters_are_refused_by_their_config_and_by_their_tensors(checkpoint: Path):
    adapter = checkpoint.parent / "adapter"
    adapter.mkdir()
    tensor = {"base_model.model.x.lora_A.weight": tiny_files.raw(np.ones((2, 3), np.float32))}
    tiny_files.write_safetensors(adapter / "adapter_model.safetensors", tensor)
    refused(adapter, "weights but no config", keelback.InvalidFile)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refused(adapter, r"adapter \(LoRA\) of org/base; merge it into its base model first")
    (checkpoint / "adapter_config.json").write_text("{}")
    refused(checkpoint, "adapter")
    (checkpoint / "adapter_config.json").unlink()
    tiny_files.write_safetensors(checkpoint / "model.safetensors", tensor)
    refused(checkpoint, "adapter")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bert"}, "bert is an encoder.*causal language model"),
        ({"model_type": "clip"}, "clip is a model of images"),
        ({"model_type": "llama"}, "llama is a transformer.*llama.cpp"),
        ({"model_type": "esm", "architectures": ["EsmForMaskedLM"]}, "EsmForMaskedLM writes no"),
        ({"model_type": {}}, "is not known"),
    ],
)
def test_other_families_are_named(checkpoint: Path, changes: dict, said: str):
    refused(edit(checkpoint, **changes), said)


def test_a_long_list_of_attention_layers_is_not_searched_for_every_layer(tmp_path: Path):
    folder = tiny.write_checkpoint("granite-dense", tmp_path / "m")
    layers = dict.fromkeys(("layer_types", "layers_block_type"), ...)
    indices = [1, *range(1 << 20, 1 << 21)]
    edit(folder, num_hidden_layers=1 << 20, attn_layer_indices=indices, **layers)
    refused(folder, "lacks the tensor", keelback.InvalidFile)  # it would take hours


MAMBA_SSM = {"d_model": 40, "n_layer": 2, "vocab_size": 61}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, r"ssm_cfg\.layer is 'Mamba3'; .*Mamba1 or Mamba2"),
        ({"rms_norm": False}, "rms_norm is False; keelback runs models with it"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, r"ssm_cfg\.rmsnorm is False"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 16}}, "d_ssm"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 7}}, "80 cannot be cut into heads of 7"),
        ({"ssm_cfg": {"d_state": "many"}}, r"ssm_cfg\.d_state is 'many'"),
        ({"ssm_cfg": [1]}, "ssm_cfg is no object"),
        ({"d_model": -1}, "d_model is -1"),
        ({"n_layer": None}, "lacks the key n_layer"),
    ],
)
def test_options_of_mamba_ssm_are_named_as_its_config_names_them(checkpoint, changes, said):
    tiny.write_config(checkpoint, MAMBA_SSM | changes)
    refused(checkpoint, said, keelback.KeelbackError)


def test_options_of_flash_linear_attention_that_make_another_model_are_refused(tmp_path: Path):
    folder = tiny.write_checkpoint("mamba2-g2", tmp_path / "m")
    refused(edit(folder, fuse_norm=True), "n_groups is 2.*before 0.5")
    refused(edit(folder, rmsnorm=False), "rmsnorm is False")
    refused(edit(folder, rmsnorm=True, norm_before_gate=True), "norm_before_gate is True")
    folder = tiny.write_checkpoint("gdn-gate", tmp_path / "g")
    refused(edit(folder, attnres_block_size=2), "attnres_block_size")


@pytest.mark.parametrize(
    ("name", "key"), [("mamba2-g2", "time_step_limit"), ("nemotron-dense", "mamba_dt_limit")]
)
def test_limits_of_time_steps_are_left_out_with_a_notice(tmp_path: Path, name: str, key: str):
    said: list[str] = []
    folder = edited(name, tmp_path, **{"time_step_limit": ..., key: [0.01, 0.1]})
    convert(folder, tmp_path / "m.gguf", notice=said.append)
    assert sum(f"{key} is [0.01, 0.1], which is left out" in text for text in said) == 1


def test_tensors_of_other_parts_are_left_out_with_one_notice(tmp_path: Path):
    folder = tiny.write_checkpoint("mamba-tied", tmp_path / "m")
    tensors = tiny.stored("mamba-tied")
    one = tiny_files.raw(np.ones(3, np.float32))
    tensors |= {"vision.a": one, "vision.b": one}
    tiny_files.write_safetensors(folder / "model.safetensors", tensors)
    refused(folder, "2 tensors have no place")
    theirs = json.loads((folder / "config.json").read_text())
    tiny.write_config(folder, {"model_type": "some_vl", "text_config": theirs})
    said: list[str] = []
    convert(folder, tmp_path / "m.gguf", notice=said.append)
    assert [text for text in said if "left out" in text] == [
        "2 tensors that are no part of the language model are left out, vision.a among them"
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model-q4_0.gguf", "GGUF, which runs as it is"), ("model.onnx", "ONNX"),
        ("tf_model.h5", "TensorFlow's; .*save_pretrained"), ("flax_model.msgpack", "Flax's"),
        ("consolidated.00.pth", "a training run"), ("last.pt", "a training run"),
        ("weights.npz", "MLX's"),
    ],
)  # fmt: skip
def test_other_formats_are_named(checkpoint: Path, name: str, said: str):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(b"x")
    refused(checkpoint, said)
    refused(checkpoint / name, said)
    (checkpoint / "config.json").unlink()
    refused(checkpoint, said)


def test_folders_that_are_no_checkpoint_say_what_is_missing(checkpoint: Path, tmp_path: Path):
    refused(tmp_path, f"holds one; give {checkpoint}", keelback.InvalidFile)
    tiny.write_checkpoint("mamba-tied", tmp_path / "another")
    refused(tmp_path, f"holds 2; give {tmp_path / 'another'}", keelback.InvalidFile)
    refused(checkpoint / "config.json", "is no folder", keelback.InvalidFile)
    shard = checkpoint / "model-00001-of-00002.safetensors"
    shard.write_bytes(b"")
    refused(shard, f"one of several files; give the folder {checkpoint}", keelback.InvalidFile)
    shard.unlink()
    (checkpoint / "config.json").unlink()
    refused(checkpoint, "weights but no config", keelback.InvalidFile)
    (checkpoint / "params.json").write_text('{"dim": 64, "n_heads": 4}')
    refused(checkpoint, r"params\.json describes a transformer")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pointers_of_git_lfs_are_told_from_weights(checkpoint: Path, name: str):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(checkpoint, f"{name} is a Git LFS pointer.*git lfs pull", keelback.InvalidFile)


def test_the_cache_of_the_hub_leads_to_its_main_snapshot(tmp_path: Path):
    cached = tmp_path / "models--org--tiny"
    for commit in ("aaaa", "bbbb"):
        tiny.write_checkpoint("mamba-tied", cached / "snapshots" / commit)
    refused(cached, "holds 2 snapshots", keelback.InvalidFile)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("../../..")
    refused(cached, "holds 2 snapshots", keelback.InvalidFile)
    (cached / "refs" / "main").write_text("bbbb")
    edit(cached / "snapshots" / "aaaa", model_type="unheard_of")
    assert convert(cached, tmp_path / "out.gguf").exists()
    refused(tmp_path, f"holds one; give {cached}", keelback.InvalidFile)


def test_files_are_called_after_the_model(checkpoint: Path, tmp_path: Path, monkeypatch):
    assert title(checkpoint) == title(checkpoint / "model.safetensors") == "mamba-tied"
    other = (checkpoint / "model.safetensors").rename(checkpoint / "small.v2.safetensors")
    assert title(other) == "small.v2"
    assert title(tmp_path / "models--org--tiny" / "snapshots" / "0123") == "tiny"
    monkeypatch.chdir(checkpoint)
    assert title(Path()) == "mamba-tied"
    assert convert(other).name == "small.v2-F32.gguf"
