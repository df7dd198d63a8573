"""Checkpoints that are recognised and cannot be converted, each with a sentence on what can."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..kernels.errors import InvalidFile, KeelbackError, UnsupportedModel
from ..kernels.op import LARGEST_DIMENSION
from .config import Config, read_json_if_there

#: Rows and columns that share a factor where config names no sizes: DeepSeek's blocks.
BLOCK = (128, 128)

#: Ends of names that only tensors of quantized checkpoints, and of adapters, have.
_PACKED = {
    "GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx"),
    "bitsandbytes": (".absmax", ".quant_map", ".SCB", ".quant_state.bitsandbytes__nf4"),
    "MLX": (".biases",),
    "HQQ": (".W_q",),
    "AQLM": (".codebooks",),
    "compressed-tensors": (".weight_packed", ".weight_zero_point"),
    "NVFP4": (".weight_scale_2", ".weight_global_scale"),
    "MXFP4": ("_blocks",),
    "quanto": (".weight._data", ".weight._scale"),
}
_ADAPTED = (".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight", ".lora_B.default.weight")

#: Files that say how the weights beside them are quantized, when config does not.
_BESIDE = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
#: All files that are looked at here.
FILES = ("adapter_config.json", "hf_quant_config.json", *_BESIDE)

_ENDS = ("MaskedLM", "Classification", "QuestionAnswering", "MultipleChoice")
_ENCODERS = (
    "albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet",
    "nomic_bert", "roberta", "xlm-roberta",
)  # fmt: skip
_IMAGES = (
    "align", "blip", "clip", "clip_vision_model", "convnext", "convnextv2", "dinov2", "dinov3_vit",
    "siglip", "siglip2", "siglip_vision_model", "swin", "vit", "vit_mae", "vim", "mambavision",
)  # fmt: skip
_TRANSFORMERS = (
    "bloom", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "falcon", "gemma", "gemma2",
    "gemma3", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss",
    "gptj", "granite", "granitemoe", "internlm2", "llama", "mistral", "mixtral", "mpt", "olmo",
    "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
    "stablelm", "starcoder2", "t5", "transformer",
)  # fmt: skip
#: What a model_type is known to be: (types, what they are, what to take instead).
_FAMILIES = (
    (_ENCODERS, "an encoder, which reads text and writes none", "take a causal language model"),
    (_IMAGES, "a model of images", "take a causal language model"),
    (
        _TRANSFORMERS,
        "a transformer, whose memory grows with the text",
        "take a recurrent model, or llama.cpp for this one",
    ),
)


def refuse_adapter(folder: Path) -> None:
    """Raise UnsupportedModel where a folder holds an adapter, alone or beside its base model."""
    path = folder / "adapter_config.json"
    if path.exists():
        raise _adapter(folder, read_json_if_there(path).get("base_model_name_or_path"))


def refuse_packed(folder: Path, names: Iterable[str]) -> None:
    """Raise UnsupportedModel for names that say that numbers are packed, or are an adapter's."""
    for name in names:
        if name.endswith(_ADAPTED):
            raise _adapter(folder, None)
        for method, ends in _PACKED.items():
            if name.endswith(ends):
                raise _quantized(folder, method)


def float8_block(folder: Path, values: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks that share a factor, from what config says of quantization.

    None where it says nothing. Raises UnsupportedModel where it says that anything is packed in
    another way than as float8.
    """
    quantized = values.get("quantization_config") or values.get("quantization")
    if not quantized:
        beside = read_json_if_there(folder / "hf_quant_config.json").get("quantization")
        quantized = {"quant_method": "modelopt", **beside} if isinstance(beside, dict) else {}
    for name, method in _BESIDE.items():
        if (folder / name).exists():
            raise _quantized(folder, method)
    if not isinstance(quantized, dict):
        raise _quantized(folder, str(quantized)[:40])
    if not quantized:
        return None
    method = _method(quantized)
    match method:
        case "fp8" | "fbgemm_fp8":
            return _pair(folder, quantized.get("weight_block_size"))
        case "modelopt" if str(quantized.get("quant_algo")).startswith("FP8"):
            return BLOCK
        case "compressed-tensors":
            return _compressed(folder, quantized)
    raise _quantized(folder, method)


def unknown_family(config: Config) -> KeelbackError | None:
    """The sentence for a model that is known to be none of the recurrent ones."""
    kind, classes = config.get("model_type"), config.get("architectures", [])
    for types, what, remedy in _FAMILIES:
        if kind in types:
            return UnsupportedModel(f"{config.path}: {kind} is {what}; {remedy}")
    if isinstance(classes, list) and classes and str(classes[0]).endswith(_ENDS):
        return UnsupportedModel(
            f"{config.path}: {str(classes[0])[:80]} writes no text; take a causal language model"
        )
    return None


def _method(quantized: dict[str, Any]) -> str:
    """What the config of a quantization calls it; two programs have not always said so."""
    if any(str(key).startswith("load_in_") for key in quantized):
        return "bitsandbytes"
    return str(quantized.get("quant_method", "MLX" if "group_size" in quantized else None))[:40]


def _compressed(folder: Path, quantized: dict[str, Any]) -> tuple[int, int]:
    """compressed-tensors: groups of layers, each with a scheme for its weights."""
    groups, block = quantized.get("config_groups"), BLOCK
    for group in groups.values() if isinstance(groups, dict) else []:
        scheme = group.get("weights") if isinstance(group, dict) else None
        scheme = scheme if isinstance(scheme, dict) else {}
        if (scheme.get("type"), scheme.get("num_bits")) != ("float", 8):
            raise _quantized(folder, f"compressed-tensors {str(quantized.get('format'))[:40]}")
        if scheme.get("strategy") == "block":
            block = _pair(folder, scheme.get("block_structure"))
        elif scheme.get("strategy") == "group":
            block = _pair(folder, [1, scheme.get("group_size")])
    return block


def _pair(folder: Path, value: Any) -> tuple[int, int]:
    if value is None:
        return BLOCK
    whole = isinstance(value, list) and all(type(n) is int for n in value)
    if not whole or len(value) != 2 or not all(0 < n <= LARGEST_DIMENSION for n in value):
        raise InvalidFile(
            f"{folder}: config gives float8 blocks of {repr(value)[:80]}, not of two whole "
            "numbers; download the checkpoint again"
        )
    return value[0], value[1]


def _quantized(folder: Path, method: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{folder} is quantized already ({method}); convert the original checkpoint, and choose a "
        "smaller type with --outtype"
    )


def _adapter(folder: Path, base: Any) -> UnsupportedModel:
    of = f" of {base[:80]}" if isinstance(base, str) else ""
    return UnsupportedModel(
        f"{folder} holds an adapter (LoRA){of}; merge it into its base model first"
    )
