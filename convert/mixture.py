"""Which type each tensor of a quantized model gets: llama.cpp's mixtures, and care for recurrences.

Source: llama.cpp's src/llama-quant.cpp. A file type such as Q4_K_M names the type of most matrices;
some, by what they do and how deep they lie, get a wider one. What is ours: the small matrices that
say how fast a state decays and what is written to it keep eight bits. Their errors do not average
out over a row of a large product, they are carried on from token to token; and they are so small
that the file hardly grows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..kernels.errors import InvalidInput
from ..kernels.formats.blocks import BY_NAME, F16, Q8_0, BlockFormat

#: llama.cpp's numbers of file types, and the type of most of their matrices.
_FILE_TYPES = {
    "F32": (0, "F32"), "F16": (1, "F16"), "BF16": (32, "BF16"), "Q8_0": (7, "Q8_0"),
    "Q6_K": (18, "Q6_K"), "Q5_K_M": (17, "Q5_K"), "Q5_K_S": (16, "Q5_K"), "Q4_K_M": (15, "Q4_K"),
    "Q4_K_S": (14, "Q4_K"), "Q4_0": (2, "Q4_0"), "IQ4_NL": (25, "IQ4_NL"), "IQ4_XS": (30, "IQ4_XS"),
    "MXFP4_MOE": (38, "MXFP4"), "Q3_K_M": (12, "Q3_K"), "Q2_K": (10, "Q2_K"),
}  # fmt: skip
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}

#: Types that single tensors can be given.
_TENSOR_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL",
    "IQ4_XS", "MXFP4", "Q3_K", "Q2_K",
)  # fmt: skip

#: What rows become that do not divide into blocks of 256; where they do not into 32, F16.
_SMALLER_BLOCKS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}  # fmt: skip

#: Parts of the names of tensors that stay as they are: small ones, and what is no matrix product.
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "ssm_conv1d",
    "shortconv.conv.weight", "altup", "laurel", "per_layer_model_proj", "indexer.k_proj.weight",
    "indexer.q_proj.weight", "attn_rel_b.weight", "position_embd", "token_types.weight",
    *(f"time_mix_{name}.weight" for name in (
        "first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1",
        "decay_w2", "lerp_fused",
    )),
)  # fmt: skip

#: Names of the matrices that drive a recurrence: decay (alpha, dt, f), what is written (beta, x),
#: both at once (ba), and the gate on what is read (g).
_RECURRENT = re.compile(r"\bssm_(alpha|beta|ba|x|dt|f_a|f_b|g_a|g_b)\.weight$")
#: Some models have them at full size, where they are ordinary matrices: one side is then not
#: smaller than the other by this factor.
_NARROW = 3

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
#: Roles by what names hold, the first that does; the others are of no particular role.
_ROLES = (
    ("attn_qkv.weight", "value"), ("attn_kv_b.weight", "value"), ("attn_v.weight", "value"),
    ("attn_k.weight", "key"), ("attn_q.weight", "query"), ("attn_output.weight", "attn_output"),
    ("ffn_up", "up"), ("ffn_gate", "gate"), ("ffn_down", "down"),
)  # fmt: skip
#: Architectures whose matrices of three dimensions are not all experts.
_OTHERS_STACKED = ("bailingmoe3",)

_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class FileType:
    """A mixture: its name, its number in `general.file_type`, and the type of most matrices."""

    name: str
    code: int
    block: BlockFormat


FILE_TYPES = {
    name: FileType(name, code, BY_NAME[block]) for name, (code, block) in _FILE_TYPES.items()
}


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor before it is quantized: `shape` slowest dimension first, the type it has."""

    name: str
    shape: tuple[int, ...]
    block: BlockFormat


@dataclass(frozen=True, slots=True)
class Traits:
    """What a mixture depends on beside names: a model's keys, 0 where a model has none.

    queries  of attention's heads, how many share keys and values in the first layer
    """

    architecture: str
    layers: int
    experts: int
    queries: int

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Traits:
        """Of a file's pairs; what makes no sense counts as missing."""
        name = str(metadata.get("general.architecture"))
        layers, experts, heads = (
            _first(metadata.get(f"{name}.{key}"))
            for key in ("block_count", "expert_count", "attention.head_count")
        )
        shared = _first(metadata.get(f"{name}.attention.head_count_kv", heads))
        return cls(name, layers, experts, heads // shared if shared else 0)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user wants otherwise than the mixture has it; llama-quantize's options.

    overrides     patterns searched in names, and types; the first that is found counts
    output        the type of `output.weight`, or of an embedding that serves as one
    embedding     the type of the token embedding
    leave_output  leave `output.weight` as it is
    pure          one type for all matrices
    plain         the mixture as llama.cpp has it, without ours for recurrences
    importance    whether there is an importance matrix
    """

    overrides: tuple[tuple[re.Pattern[str], BlockFormat], ...] = ()
    output: BlockFormat | None = None
    embedding: BlockFormat | None = None
    leave_output: bool = False
    pure: bool = False
    plain: bool = False
    importance: bool = False


NO_WISHES = Wishes()


def file_type(name: str) -> FileType:
    """The mixture of a name in any case; raises InvalidInput where there is none."""
    found = FILE_TYPES.get(_ALIASES.get(name.upper(), name.upper()))
    if found is None:
        raise InvalidInput(
            f"the type {name[:40]!r} cannot be written; choose one of {', '.join(FILE_TYPES)}; "
            + ", ".join(f"{short} is {whole}" for short, whole in _ALIASES.items())
        )
    return found


def tensor_type(name: str) -> BlockFormat:
    """The type of single tensors of a name in any case; raises InvalidInput where there is none."""
    if name.upper() not in _TENSOR_TYPES:
        raise InvalidInput(
            f"tensors cannot be written as {name[:40]!r}; choose one of {', '.join(_TENSOR_TYPES)}"
        )
    return BY_NAME[name.upper()]


def override(text: str) -> tuple[re.Pattern[str], BlockFormat]:
    """`PATTERN=TYPE` as Wishes has it; raises InvalidInput for anything else."""
    pattern, equals, name = text.rpartition("=")
    if not pattern or not equals:
        raise InvalidInput(f"{text[:80]!r} names no type; write it as PATTERN=TYPE")
    try:
        return re.compile(pattern, re.IGNORECASE), tensor_type(name)
    except re.error as error:
        raise InvalidInput(f"{pattern[:80]!r} is no regular expression: {error}") from None


def types_of(
    weights: Iterable[Weight], kind: FileType, traits: Traits, wishes: Wishes = NO_WISHES
) -> dict[str, BlockFormat]:
    """The type that each tensor of a model gets, by name."""
    ordered = sorted(weights, key=_place)
    mixture = _Mixture(kind, traits, wishes, [weight.name for weight in ordered])
    return {weight.name: mixture.type_of(weight) for weight in ordered}


def is_quantizable(weight: Weight) -> bool:
    """Whether a tensor is a matrix, or a stack of them, that may change its type."""
    dimensions = max((i for i, n in enumerate(reversed(weight.shape), 1) if n > 1), default=1)
    kept = any(part in weight.name for part in _KEPT)
    return dimensions > 1 and weight.name.endswith("weight") and not kept


def drives_recurrence(weight: Weight) -> bool:
    """Whether a tensor is one of the small matrices whose errors a state carries on."""
    short, long = sorted(weight.shape[-2:])
    return _RECURRENT.search(weight.name) is not None and short * _NARROW <= long


def is_rounded(block: BlockFormat) -> bool:
    """Whether a type has fewer bits than what a model is trained in."""
    return block.elements > 1


class _Mixture:
    """The rules, asked tensor by tensor in llama.cpp's order: some count what went before."""

    def __init__(self, kind: FileType, traits: Traits, wishes: Wishes, names: list[str]) -> None:
        self._kind, self._traits, self._wishes = kind, traits, wishes
        self._tied = "output.weight" not in names
        self._values = sum(_role(name) == "value" for name in names)
        self._seen = {"value": 0, "down": 0}

    def type_of(self, weight: Weight) -> BlockFormat:
        wishes, name, width = self._wishes, weight.name, weight.shape[-1]
        if not is_quantizable(weight) or (wishes.leave_output and name == "output.weight"):
            return weight.block
        if wishes.embedding is not None and name in _EMBEDDINGS:
            return fitting(wishes.embedding, width)
        if wishes.output is not None and name == "output.weight":
            return fitting(wishes.output, width)
        for pattern, block in wishes.overrides:
            if pattern.search(name):
                return fitting(block, width)
        base = self._kind.block
        if wishes.pure or not is_rounded(base):
            return fitting(base, width)
        chosen = fitting(self._of_role(weight), width)
        if not wishes.plain and drives_recurrence(weight) and is_rounded(chosen):
            # What others rounded before gets no better by more bits.
            return weight.block if is_rounded(weight.block) else fitting(Q8_0, width)
        return chosen

    def _of_role(self, weight: Weight) -> BlockFormat:
        """The type for what a matrix does, whatever the length of its rows."""
        base, role = self._kind.block, _role(weight.name)
        if weight.name == "output.weight" or (self._tied and weight.name in _EMBEDDINGS):
            return self._of_output(weight)
        if self._kind.name == "MXFP4_MOE":
            stacked = len(weight.shape) > 2 and weight.shape[-3] > 1
            experts = role in ("up", "gate", "down")
            only = self._traits.architecture not in _OTHERS_STACKED
            return base if stacked and (experts or only) else Q8_0
        if role == "value":
            index = self._count("value")
            return Q8_0 if self._traits.experts == 8 else self._named(self._of_value(index))
        if role == "key" and self._traits.experts == 8:
            return Q8_0
        if role == "down":
            block = _BLOCK.match(weight.name)
            index = self._count("down")
            if self._traits.experts > 1 and block is not None:
                index = int(block[1])
            return self._named(self._of_down(index))
        return self._named(self._of_attn_output()) if role == "attn_output" else base

    def _of_output(self, weight: Weight) -> BlockFormat:
        base = self._kind.block
        if self._wishes.output is not None:
            return self._wishes.output
        coarse = self._kind.name != "MXFP4_MOE" and base is not Q8_0
        return BY_NAME["Q6_K"] if coarse and weight.shape[-1] % base.elements == 0 else Q8_0

    def _of_value(self, index: int) -> str | None:
        """Values of attention, also where they are one matrix with queries and keys."""
        match self._kind.name:
            case "Q2_K":
                return "Q4_K" if self._traits.queries >= 4 else "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if index < 2 else "Q4_K"
            case "Q4_K_S":
                return "Q5_K" if index < 4 else None
            case "Q4_K_M" | "Q5_K_M":
                return "Q6_K" if _deserves_more(index, self._values) else None
            case "IQ4_NL" | "IQ4_XS":
                return "Q5_K" if self._traits.queries >= 4 else None
        return None

    def _of_down(self, index: int) -> str | None:
        """The matrix that a feed-forward network ends with."""
        layers, informed = self._traits.layers, self._wishes.importance
        match self._kind.name:
            case "Q2_K":
                return "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if index < layers // 16 else "Q4_K"
            case "Q4_K_S":
                return "Q5_K" if index < layers // 8 else None
            case "Q4_K_M" | "Q5_K_M":
                return "Q6_K" if _deserves_more(index, layers) else None
            case "IQ4_NL" | "IQ4_XS":
                return "Q5_K" if index < layers // 8 and not informed else None
            case "Q4_0":
                return "Q4_1" if index < layers // 8 and informed else None
        return None

    def _of_attn_output(self) -> str | None:
        name = self._kind.name
        if self._traits.experts == 8:
            few = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return "Q5_K" if name in few else None
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(name)

    def _named(self, name: str | None) -> BlockFormat:
        return self._kind.block if name is None else BY_NAME[name]

    def _count(self, role: str) -> int:
        self._seen[role] += 1
        return self._seen[role] - 1


def fitting(block: BlockFormat, width: int) -> BlockFormat:
    """A type, or the nearest whose blocks rows of so many numbers divide into."""
    if width % block.elements == 0:
        return block
    smaller = BY_NAME[_SMALLER_BLOCKS.get(block.name, block.name)]
    return F16 if width % smaller.elements else smaller


def _deserves_more(index: int, count: int) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    first = count // 8
    return index < first or index >= 7 * count // 8 or (index - first) % 3 == 2


def _role(name: str) -> str | None:
    return next((role for part, role in _ROLES if part in name), None)


def _place(weight: Weight) -> tuple[int, str]:
    """llama.cpp's order: what is in no block, then block by block, by name."""
    block = _BLOCK.match(weight.name)
    return (-1 if block is None else int(block[1])), weight.name


def _first(value: Any) -> int:
    """A whole number, of a list the first; 0 for anything else."""
    if hasattr(value, "__len__") and not isinstance(value, str):
        value = value[0] if len(value) else 0
    try:
        return max(0, int(value)) if not isinstance(value, str) else 0
    except (TypeError, ValueError, OverflowError):
        return 0
