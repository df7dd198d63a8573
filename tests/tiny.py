"""Tiny random checkpoints in Hugging Face layouts, made from a seed instead of being stored.

Every number is an affine map of `RandomState.random_sample`, whose stream NumPy has frozen, and
needs no function of the C library: the files are the same bytes on every machine, so the logits
in golden/ (made once by make_golden.py) stay valid.
"""

from __future__ import annotations

import json
import math
import runpy
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import tiny_files
from tiny_files import Raw
from tiny_shapes import SHAPES

_TAGS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One checkpoint: its config.json, its dtype on disk, its files, and tensors to shrink."""

    name: str
    model_type: str
    config: dict[str, Any]
    dtype: str = "float32"
    shards: int = 1
    # Part of a tensor name -> factor: small activations make the eps inside a norm visible.
    gain: dict[str, float] = field(default_factory=dict)
    # Rows and columns of the blocks in which the projections of layers were float8 once.
    float8: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """What a file of families/ says of a model_type, in `FAMILIES`, a list of these.

    defaults   its config.json, of which a variant replaces some values
    shapes     config -> names and shapes of the tensors on disk
    variants   (name, hidden_size, vocab_size, what is replaced: also fields of Variant)
    in_memory  tensors on disk -> the same as the reference names and arranges them in memory
    llamacpp   variants that llama.cpp runs with the same logits, from our file and from its own
    misread    variants that it runs from our file alone: its converter makes other models of them
    said       variants of which the converter says that only keelback runs them
    intervals  ends of names -> what tensors are drawn from, where it is not what others are
    as_written whether llama.cpp's converter has to read config.json without transformers
    """

    model_type: str
    defaults: dict[str, Any]
    shapes: Callable[[dict[str, Any]], Iterator[tuple[str, tuple[int, ...]]]]
    variants: list[tuple[str, int, int, dict[str, Any]]]
    in_memory: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda tensors: tensors
    llamacpp: tuple[str, ...] = ()
    misread: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    intervals: tuple[tuple[tuple[str, ...], float, float], ...] = ()
    as_written: bool = False


_COMMON: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_MAMBA = _COMMON | {
    "architectures": ["MambaForCausalLM"],
    "expand": 2,
    "state_size": 16,
    "conv_kernel": 4,
    "time_step_rank": "auto",
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": True,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
_MAMBA2 = _COMMON | {
    "architectures": ["Mamba2ForCausalLM"],
    "expand": 2,
    "state_size": 16,
    "conv_kernel": 4,
    "chunk_size": 16,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": True,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_GDN = _COMMON | {
    "architectures": ["GatedDeltaNetForCausalLM"],
    "num_v_heads": None,
    "expand_v": 2.0,
    "use_gate": True,
    "use_short_conv": True,
    "conv_size": 4,
    "allow_neg_eigval": False,
    "output_gate_activation": "swish",
    "attn": None,
    "attn_mode": "chunk",
    "norm_eps": 1e-6,
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "intermediate_size": 72,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_HYBRID = _COMMON | {
    "num_hidden_layers": 3,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "attention_bias": False,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
}
_GRANITE = _HYBRID | {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "layer_types": ["mamba", "attention", "mamba"],
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "position_embedding_type": "nope",
    # Multipliers that would be missed, of the size of real ones.
    "embedding_multiplier": 3.5,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.3,
    "logits_scaling": 1.7,
    "tie_word_embeddings": True,
}
_BAMBA = _HYBRID | {
    "architectures": ["BambaForCausalLM"],
    "attn_layer_indices": [1],
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_DEFAULTS = {
    "granitemoehybrid": _GRANITE,
    "bamba": _BAMBA,
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA | {"architectures": ["FalconMambaForCausalLM"]},
    "mamba2": _MAMBA2,
    "gated_deltanet": _GDN,
}

VARIANTS: dict[str, Variant] = {}
#: Families with a file of their own, by model_type.
FAMILIES: dict[str, Family] = {}
_OF_VARIANT = ("dtype", "shards", "gain", "float8")


def _add(model_type: str, name: str, hidden: int, vocab: int, **over: Any) -> None:
    """Register a checkpoint: its family's defaults with some values replaced."""
    extra = {key: over.pop(key) for key in _OF_VARIANT if key in over}
    config = _DEFAULTS[model_type] | over
    config |= {"model_type": model_type, "hidden_size": hidden, "vocab_size": vocab}
    if model_type in ("mamba", "falcon_mamba"):  # transformers stores the product too
        config["intermediate_size"] = config["expand"] * hidden
    VARIANTS[name] = Variant(name, model_type, config, **extra)


# fmt: off
_add("mamba", "mamba-tied", 40, 61)
_add("mamba", "mamba-untied", 44, 67, state_size=8, conv_kernel=3, time_step_rank=5,
     num_hidden_layers=3, layer_norm_epsilon=1e-4, tie_word_embeddings=False)
_add("mamba", "mamba-bias", 36, 59, state_size=5, time_step_rank=2, use_bias=True)
_add("mamba", "mamba-noconvbias", 52, 71, use_conv_bias=False, time_step_rank=4,
     tie_word_embeddings=False)
_add("mamba", "mamba-expand3", 36, 53, expand=3, state_size=8, time_step_rank=3)
_add("mamba", "mamba-q8", 96, 97)
_add("mamba", "mamba-f16", 44, 61, state_size=8, time_step_rank=3, dtype="float16",
     tie_word_embeddings=False)

_add("falcon_mamba", "falcon-untied", 44, 67, mixer_rms_eps=1e-6, time_step_rank=3,
     tie_word_embeddings=False, gain={"x_proj": 0.03})
_add("falcon_mamba", "falcon-tied", 36, 59, mixer_rms_eps=1e-5, state_size=8, conv_kernel=3,
     time_step_rank=5, gain={"x_proj": 0.03})

_add("mamba2", "mamba2-g1", 40, 61, num_heads=10, head_dim=8, n_groups=1, chunk_size=256)
_add("mamba2", "mamba2-g2", 36, 67, num_heads=6, head_dim=12, n_groups=2, state_size=20,
     conv_kernel=3, layer_norm_epsilon=1e-4, tie_word_embeddings=True)
# The two spellings of an unlimited step: transformers 5 writes an object, 4 a bare Infinity.
_add("mamba2", "mamba2-g4", 40, 71, num_heads=20, head_dim=4, n_groups=4, state_size=20,
     time_step_limit=[0.0, {"__float__": "Infinity"}])
_add("mamba2", "mamba2-bias", 44, 59, num_heads=11, head_dim=8, n_groups=1, use_bias=True,
     time_step_limit=[0.0, math.inf], tie_word_embeddings=True)
_add("mamba2", "mamba2-noconvbias", 52, 61, num_heads=13, head_dim=8, n_groups=1,
     use_conv_bias=False)
_add("mamba2", "mamba2-sharded", 36, 53, num_heads=9, head_dim=8, n_groups=3,
     num_hidden_layers=3, shards=2)
_add("mamba2", "mamba2-q8", 96, 97, num_heads=12, head_dim=16, n_groups=2,
     tie_word_embeddings=True)
# 256 columns: the smallest matrices that the K-quants (super-blocks of 256) apply to.
_add("mamba2", "mamba2-k256", 256, 67, num_heads=8, head_dim=64, n_groups=2, state_size=24)

# Small contributions of the layers: rounding is then not amplified from one to the next.
_WIDE = {"gain": {"out_proj": 0.2, "output_linear": 0.2}}
_add("mamba", "mamba-wide", 256, 97, **_WIDE)
_add("mamba2", "mamba2-wide", 256, 97, num_heads=8, head_dim=64, n_groups=2, state_size=24,
     tie_word_embeddings=True, **_WIDE)
_add("granitemoehybrid", "granite-wide", 256, 97, num_attention_heads=4, num_key_value_heads=2,
     mamba_n_heads=8, mamba_d_head=64, intermediate_size=512, shared_intermediate_size=512, **_WIDE)

# What mamba_ssm and Codestral do not say in their configs: heads of 64, states of 128.
_add("mamba2", "mamba2-silent", 32, 56, num_heads=1, head_dim=64, n_groups=1, state_size=128,
     tie_word_embeddings=True)
_add("mamba2", "mamba2-codestral", 64, 61, num_heads=2, head_dim=64, n_groups=2, state_size=128,
     num_hidden_layers=3, dtype="bfloat16")
_add("mamba2", "mamba2-float8", 40, 61, num_heads=10, head_dim=8, n_groups=2, float8=(16, 12))

_add("mamba", "mamba-float8", 40, 59, float8=(1, 4096))

_add("gated_deltanet", "gdn-gate", 40, 61, num_heads=2, head_dim=12)
_add("gated_deltanet", "gdn-nogate", 44, 67, num_heads=3, head_dim=8, expand_v=1.0,
     use_gate=False, conv_size=3, intermediate_size=None, tie_word_embeddings=True)
_add("gated_deltanet", "gdn-negeig", 36, 59, num_heads=2, head_dim=16, num_v_heads=4,
     expand_v=1.5, allow_neg_eigval=True)
# Short vectors q and k make the 1e-6 inside their l2 norm visible.
_add("gated_deltanet", "gdn-gva", 52, 71, num_heads=2, head_dim=8, num_v_heads=6, expand_v=1,
     conv_size=3, norm_eps=1e-5, tie_word_embeddings=True,
     gain={"q_conv1d": 0.03, "k_conv1d": 0.03, "v_conv1d": 0.1})
_add("gated_deltanet", "gdn-q8", 96, 97, num_heads=3, head_dim=32, intermediate_size=160)
_add("gated_deltanet", "gdn-bf16", 40, 67, num_heads=4, head_dim=10, expand_v=1,
     num_hidden_layers=3, dtype="bfloat16")

_add("gated_deltanet", "gdn-noconv", 40, 61, num_heads=2, head_dim=12, num_v_heads=4,
     use_short_conv=False)
# The window is in one layer of attention and not in the other.
_add("gated_deltanet", "gdn-attn", 40, 61, num_heads=2, head_dim=12, num_hidden_layers=3,
     attn={"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 7, "qkv_bias": True})
_add("gated_deltanet", "gdn-attns", 48, 67, num_heads=2, head_dim=12, num_v_heads=4, expand_v=1,
     num_hidden_layers=4, tie_word_embeddings=True,
     attn=[{"layers": [0], "num_heads": 6, "num_kv_heads": 3, "rope_theta": 300.0},
           {"layers": [2], "num_heads": 4, "window_size": 12, "rope_theta": 300.0}])
_add("gated_deltanet", "gdn-float8", 40, 61, num_heads=2, head_dim=12, float8=(4096, 4096))

_add("granitemoehybrid", "granite-dense", 40, 61, num_attention_heads=5, num_key_value_heads=1,
     mamba_n_heads=10, mamba_d_head=8, intermediate_size=52, shared_intermediate_size=52)
_add("granitemoehybrid", "granite-moe", 36, 67, num_attention_heads=6, num_key_value_heads=2,
     mamba_n_heads=12, mamba_d_head=6, mamba_n_groups=3, mamba_d_state=20, mamba_d_conv=3,
     num_local_experts=6, num_experts_per_tok=3, intermediate_size=20,
     shared_intermediate_size=28, tie_word_embeddings=False, gain={"router": 3})
_add("granitemoehybrid", "granite-rope", 40, 59, num_attention_heads=4, num_key_value_heads=2,
     mamba_n_heads=5, mamba_d_head=16, intermediate_size=44, shared_intermediate_size=44,
     position_embedding_type="rope", rope_theta=500.0, attention_bias=True,
     layer_types=["full_attention", "linear_attention", "full_attention"])
_add("granitemoehybrid", "granite-q8", 96, 97, num_attention_heads=6, num_key_value_heads=2,
     mamba_n_heads=12, mamba_d_head=16, mamba_n_groups=2, num_local_experts=5,
     num_experts_per_tok=2, intermediate_size=64, shared_intermediate_size=96,
     position_embedding_type="rope", gain={"router": 3})
_add("granitemoehybrid", "granite-q8-32", 96, 97, num_attention_heads=3, num_key_value_heads=1,
     mamba_n_heads=12, mamba_d_head=16, intermediate_size=96, shared_intermediate_size=96)
_add("bamba", "bamba-grouped", 48, 67, num_attention_heads=4, num_key_value_heads=2,
     mamba_n_heads=8, mamba_d_head=12, mamba_n_groups=2, intermediate_size=76, attn_rotary_emb=6)
_add("bamba", "bamba-bias", 48, 53, num_attention_heads=3, num_key_value_heads=3,
     mamba_n_heads=12, mamba_d_head=8, intermediate_size=52, attn_layer_indices=[0, 2],
     mamba_proj_bias=True, attention_bias=True, mlp_bias=True, rope_theta=300.0,
     tie_word_embeddings=True)
# fmt: on


def _add_families() -> None:
    for file in sorted((Path(__file__).parent / "families").glob("*.py")):
        for family in runpy.run_path(str(file))["FAMILIES"]:
            FAMILIES[family.model_type] = family
            _DEFAULTS[family.model_type] = _COMMON | family.defaults
            SHAPES[family.model_type] = family.shapes
            for name, hidden, vocab, over in family.variants:
                _add(family.model_type, name, hidden, vocab, **over)


# End of a tensor name -> the interval it is drawn from; other tensors are matrices.
_INTERVALS = (
    (("embeddings.weight", "embed_tokens.weight"), -0.4, 0.4),
    (("norm.weight", "norm_f.weight"), 0.5, 1.5),
    (("A_log",), -1.0, 1.5),
    (("dt_bias", "dt_proj.bias"), -4.0, 0.5),  # steps between 0.02 and 1
    ((".D",), 0.3, 1.7),
    (("conv1d.weight",), -1.0, 1.0),
    ((".bias",), -0.5, 0.5),
)
# What a layer adds stays near the size of the embeddings: rounding is then not amplified from
# layer to layer, and the stream remains small enough for a wrong norm eps to show.
_BRANCH_ENDS = (
    "out_proj.weight", "o_proj.weight", "down_proj.weight", "output_linear.weight", "w2.weight",
    ".dense.weight",
)  # fmt: skip
_BRANCH_GAIN = 0.25


def draw(variant: Variant, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor in float32, from a stream of its own so that it never depends on the others."""
    rng = np.random.RandomState(zlib.crc32(f"{variant.name}/{name}".encode()))
    low, high = -math.sqrt(3 / shape[-1]), math.sqrt(3 / shape[-1])  # variance 1 / fan_in
    family = FAMILIES.get(variant.model_type)
    for ends, *interval in (*(family.intervals if family else ()), *_INTERVALS):
        if name.endswith(ends):
            low, high = interval
            break
    values = low + (high - low) * rng.random_sample(shape)
    for part, factor in variant.gain.items():
        if part in name:
            values = values * factor
    if name.endswith(_BRANCH_ENDS):
        values = values * _BRANCH_GAIN
    return values.astype(np.float32)


def is_float8(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a variant with `float8` is made of such numbers: the projections are."""
    return len(shape) == 2 and "layers" in name and name.endswith("proj.weight")


def _tensors(variant: Variant) -> dict[str, np.ndarray]:
    shapes = dict(SHAPES[variant.model_type](variant.config))
    if not variant.config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (variant.config["vocab_size"], variant.config["hidden_size"])
    tensors = {name: draw(variant, name, shape) for name, shape in shapes.items()}
    if variant.float8:
        for name, shape in shapes.items():
            if is_float8(name, shape):
                numbers, factors = tiny_files.float8(tensors[name], variant.float8)
                tensors[name] = tiny_files.dequantized(numbers, factors, variant.float8)
    return tensors


def stored(name: str) -> dict[str, Raw]:
    """The tensors of a checkpoint in the type that the variant has on disk."""
    variant = VARIANTS[name]
    kind = _TAGS[variant.dtype]
    return {key: tiny_files.raw(values, kind) for key, values in _tensors(variant).items()}


def weights(name: str) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint as they come back from disk: rounded, then float32."""
    return {key: tiny_files.read(tensor) for key, tensor in stored(name).items()}


def ids(name: str, length: int) -> np.ndarray:
    """Seeded token ids, int64 (length,); a shorter call returns a prefix of a longer one."""
    rng = np.random.RandomState(zlib.crc32(f"{name}/ids".encode()))
    return (rng.random_sample(length) * VARIANTS[name].config["vocab_size"]).astype(np.int64)


def write_config(folder: Path, config: dict[str, Any], file: str = "config.json") -> None:
    """A config, as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / file).write_text(text + "\n", encoding="utf-8")


def write_checkpoint(name: str, folder: Path) -> Path:
    """Write config.json and the safetensors file or files of one variant; returns the folder."""
    variant = VARIANTS[name]
    write_config(folder, variant.config | {"dtype": variant.dtype})
    if variant.shards == 1:
        tiny_files.write_safetensors(folder / "model.safetensors", stored(name))
    else:
        form = tiny_files.SAFETENSORS
        tiny_files.write_shards(folder, stored(name), form, variant.shards)
    return folder


_add_families()
