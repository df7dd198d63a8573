"""What most architectures have: kinds of layers, projections, norms, MLPs, and both ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from ..kernels.errors import InvalidFile, UnsupportedModel
from .checkpoint import Checkpoint
from .config import Config
from .plan import Part, Plan
from .rope import side_by_side
from .source import equal

#: What has no context limit gets this one, as from llama.cpp.
CONTEXT_LENGTH = 1 << 20
#: How releases of transformers have called layers; the first name of each is keelback's.
KINDS = {
    "full_attention": ("full_attention", "attention"),
    "linear_attention": ("linear_attention", "mamba"),
}


def layer_types(config: Config, kinds: Mapping[str, tuple[str, ...]] = KINDS) -> list[str] | None:
    """The kind of every layer, as `layer_types` names it; None where config has no such list.

    Raises InvalidFile for a list of another length, UnsupportedModel for an unknown kind.
    """
    types, name = config.get("layer_types"), config.name("layer_types")
    if types is None:
        return None
    if not isinstance(types, list):
        raise InvalidFile(f"{config.path}: {name} is no list of layers")
    # transformers 5 leaves the number out where it has such a list.
    count = config.count("num_hidden_layers", len(types))
    if len(types) != count:
        raise InvalidFile(f"{config.path}: {name} does not name {count} layers")
    known = {spelling: kind for kind, names in kinds.items() for spelling in names}
    for kind in types:
        if not isinstance(kind, str) or kind not in known:
            raise UnsupportedModel(
                f"{config.path}: {name} names {str(kind)[:40]!r}; keelback runs "
                f"{' and '.join(names[-1] for names in kinds.values())}"
            )
    return [known[kind] for kind in types]


def periodic(config: Config, kind: str, period: int, offset: int) -> list[int]:
    """Layers that are of a kind: one in every period. period, offset: of a silent config.

    Raises InvalidFile where the two are no numbers that go together.
    """
    period = config.count(f"{kind}_layer_period", period)
    offset = config.get(f"{kind}_layer_offset", offset)
    if type(offset) is not int or not 0 <= offset < period:
        raise InvalidFile(
            f"{config.path}: {kind}_layer_offset is {repr(offset)[:40]}, not a whole number below "
            f"{kind}_layer_period, {period}"
        )
    return list(range(offset, config.count("num_hidden_layers"), period))


def refuse_attention_only(config: Config, attends: Iterable[bool]) -> None:
    """Raise UnsupportedModel where all layers are of attention."""
    if all(attends):
        raise UnsupportedModel(
            f"{config.path}: all layers are attention; keelback runs models with recurrent layers"
        )


def head_counts(config: Config, heads: int = 32, key_heads: int | None = None) -> tuple[int, int]:
    """Heads of queries and heads of keys, which those share evenly.

    heads, key_heads: of a silent config. Raises InvalidFile where they cannot be shared so.
    """
    return config.multiple("num_attention_heads", "num_key_value_heads", heads, key_heads)


def head_length(config: Config, heads: int) -> int:
    """Values of a head: `head_dim`, or where config has none an even share of hidden_size.

    Raises InvalidFile where there are no even shares.
    """
    if config.get("head_dim") is not None:
        return config.count("head_dim")
    d_model = config.count("hidden_size")
    if d_model % heads:
        raise InvalidFile(
            f"{config.path}: num_attention_heads is {heads}, which does not divide hidden_size "
            f"{d_model}"
        )
    return d_model // heads


def head_width(config: Config, d_model: int, heads: int) -> int:
    """Values of a head, in architectures that know only hidden_size / num_attention_heads.

    Raises UnsupportedModel for another head_dim.
    """
    if d_model % heads or config.count("head_dim", d_model // heads) != d_model // heads:
        raise UnsupportedModel(
            f"{config.path}: head_dim is {config.get('head_dim')}, and this architecture knows "
            f"only hidden_size / num_attention_heads, {d_model} / {heads}"
        )
    return d_model // heads


def remark_inner_size(result: Plan) -> None:
    """llama.cpp knows recurrences of twice the hidden size."""
    d_model, d_inner = result.keys["embedding_length"], result.keys["ssm.inner_size"]
    if d_inner != 2 * d_model:
        result.remark(
            f"for keelback only: the inner size {d_inner} is not twice the hidden size {d_model}"
        )


def add_linear(
    result: Plan,
    checkpoint: Checkpoint,
    hf: str,
    gguf: str,
    rows: int,
    columns: int,
    order: np.ndarray | None = None,
) -> None:
    """A matrix (rows, columns), and its bias where the checkpoint has one.

    order: in which the checkpoint's rows are taken.
    """
    weight = checkpoint.require(f"{hf}.weight", rows, columns)
    result.add(f"{gguf}.weight", (rows, columns), Part(weight, rows=order))
    bias = checkpoint.find(f"{hf}.bias", rows)
    if bias is not None:
        result.add(f"{gguf}.bias", (rows,), Part(bias, columns=order))


def add_norm(
    result: Plan,
    checkpoint: Checkpoint,
    hf: str,
    gguf: str,
    width: int,
    function: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """The weight of a norm. function: `plus_one` where the checkpoint has it less one."""
    weight = checkpoint.require(f"{hf}.weight", width)
    result.add(f"{gguf}.weight", (width,), Part(weight, function=function))


def plus_one(weight: np.ndarray) -> np.ndarray:
    """Norms that are stored around zero: GGUF holds what is multiplied with."""
    return weight + np.float32(1)


def add_attention(
    result: Plan,
    checkpoint: Checkpoint,
    hf: str,
    blk: str,
    d_model: int,
    heads: tuple[int, int],
    d_head: int,
    paired: int = 0,
    output: str = "o_proj",
) -> None:
    """Projections of attention, whose names begin with `hf` in the checkpoint.

    heads: of queries, and of keys. paired: how many values of every head of both have the rotary
    pairs (i, i + paired / 2) laid side by side. output: what the last one is called.
    """
    for name, count in zip("qkv", (*heads, heads[1]), strict=True):
        rows, order = count * d_head, None
        if paired and name in "qk":
            # First of all: what config says of sizes is true only if the tensor has them.
            checkpoint.require(f"{hf}.{name}_proj.weight", rows, d_model)
            order = side_by_side(count, d_head, paired)
        theirs, ours = f"{hf}.{name}_proj", f"{blk}.attn_{name}"
        add_linear(result, checkpoint, theirs, ours, rows, d_model, order)
    inner = heads[0] * d_head
    add_linear(result, checkpoint, f"{hf}.{output}", f"{blk}.attn_output", d_model, inner)


def add_mlp(
    result: Plan,
    checkpoint: Checkpoint,
    hf: str,
    blk: str,
    width: int,
    d_model: int,
    names: Mapping[str, str],
    suffix: str = "",
) -> None:
    """An MLP of `width`: its matrices by what the checkpoint calls gate, up and down.

    suffix: "_shexp" for one that stands beside experts.
    """
    for part, theirs in names.items():
        shape = (d_model, width) if part == "down" else (width, d_model)
        add_linear(result, checkpoint, f"{hf}.{theirs}", f"{blk}.ffn_{part}{suffix}", *shape)


def add_ends(
    result: Plan,
    checkpoint: Checkpoint,
    embedding: str,
    norm: str,
    function: Callable[[np.ndarray], np.ndarray] | None = None,
    target: str = "output_norm.weight",
) -> None:
    """The embedding, the last norm, and the output matrix unless it is the embedding again.

    function: what is applied to the norm's weight. target: what llama.cpp calls it.
    """
    d_model = result.keys["embedding_length"]
    table = checkpoint.require(embedding)
    vocabulary = table.shape[0] if table.shape else 0
    table = checkpoint.require(embedding, vocabulary, d_model)
    result.keys["vocab_size"] = vocabulary
    result.add("token_embd.weight", (vocabulary, d_model), table)
    last = Part(checkpoint.require(norm, d_model), function=function)
    result.add(target, (d_model,), last)
    # Where config says that it is a matrix of its own, the embedding would not do for it.
    own = checkpoint.config.get("tie_word_embeddings") is False
    take = checkpoint.require if own else checkpoint.find
    head = take("lm_head.weight", vocabulary, d_model)
    if head is not None and not equal(head, table):
        result.add("output.weight", (vocabulary, d_model), head)


def add_conv(result: Plan, checkpoint: Checkpoint, mixer: str, blk: str, channels: int) -> None:
    """The causal convolution; llama.cpp demands a bias, so a missing one becomes zeros."""
    taps = result.keys["ssm.conv_kernel"]
    weight = checkpoint.require(f"{mixer}.conv1d.weight", channels, taps)
    result.add(f"{blk}.ssm_conv1d.weight", (channels, taps), weight)
    bias = checkpoint.find(f"{mixer}.conv1d.bias", channels)
    result.add(f"{blk}.ssm_conv1d.bias", (channels,), *([] if bias is None else [bias]))


def add_projection_biases(
    result: Plan, checkpoint: Checkpoint, mixer: str, blk: str, inner: int
) -> None:
    """`use_bias`: llama.cpp has no slot for these."""
    d_model = result.keys["embedding_length"]
    for hf, gguf, size in (("in_proj", "ssm_in", inner), ("out_proj", "ssm_out", d_model)):
        bias = checkpoint.find(f"{mixer}.{hf}.bias", size)
        if bias is not None:
            result.add(f"{blk}.{gguf}.bias", (size,), bias)
            result.remark(
                "for keelback only: the projections have biases (ssm_in.bias, ssm_out.bias)"
            )
