"""What a run takes in memory, known before its weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import models
from ..kernels.attention import SPAN
from ..kernels.errors import InvalidInput
from ..kernels.formats.panels import PANELS
from ..kernels.op import Kind, Weight
from ..models.graph import Graph
from .backend import MAX_ROWS
from .info import open_file
from .lowering import Program, lower
from .packing import STRIDE
from .platform import available_memory
from .state import PAGE_ROWS, SHARED_ROWS, Layout, cache_types, state_type_named
from .weights import WeightStore, panel_bytes
from .wording import size

#: Tokens that a text is taken to have where nothing is said.
CONTEXT = 4096
#: Python, NumPy, what is left of LLVM, and the kernels; measured, on Linux.
INTERPRETER = 45 << 20
#: What there is while kernels are loaded, before weights are: LLVM for the most part, whose pages
#: are then given back; measured as well.
LOADING = 90 << 20
#: A tokenizer's library, and what it takes for every token; measured.
TOKENIZER, TOKEN = 6 << 20, 450
#: Panels may take so much of the memory that is available; else weights stay in the file.
SHARE = 0.6

#: What may refuse a lowered graph, its weights and states, and a number of threads, by raising.
Admission = Callable[[Program, WeightStore, Layout, int], None]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of resident memory at most while a prompt is read, by what takes them.

    panels, mapped, converted, vectors  weights: rearranged, as they are in the file, widened, and
                                        float32 vectors
    twice                               pages of the file, of what is just being rearranged
    arena, scratch                      rows of the largest forward; what each thread works in
    state, cache                        all sequences, fixed, and keys and values of their tokens
    shared                              what threads tell each other of long texts
    copies                              of the states, for as long as a prompt is read
    logits                              of all sequences
    tokenizer                           its tokens and merges
    interpreter                         everything else
    """

    panels: int
    mapped: int
    converted: int
    vectors: int
    twice: int
    arena: int
    scratch: int
    state: int
    cache: int
    shared: int
    copies: int
    logits: int
    tokenizer: int
    interpreter: int = INTERPRETER

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    @property
    def held(self) -> int:
        """What the system cannot take back: all but the pages of the file."""
        return self.total - self.mapped - self.twice

    @property
    def peak(self) -> int:
        """A small model takes most before it is there."""
        return max(self.total, LOADING)


def footprint(
    program: Program,
    store: WeightStore,
    layout: Layout,
    threads: int,
    context: int = CONTEXT,
    sequences: int = 1,
) -> Footprint:
    """What a lowered graph takes with a number of sequences of `context` tokens each."""
    fixed = layout.size * sequences
    tokens = -(-context // PAGE_ROWS) * PAGE_ROWS
    return Footprint(
        **store.sizes,
        # The largest portion is less than two strides.
        twice=min(store.sizes["panels"], 2 * STRIDE),
        arena=program.arena_bytes,
        scratch=threads * program.scratch,
        state=fixed,
        cache=tokens * layout.bytes_per_token * sequences,
        shared=_shared(program, context),
        # A text's first rows need none.
        copies=fixed if context > MAX_ROWS else 0,
        # A forward's, what is returned, and what the state keeps.
        logits=3 * program.vocabulary * _FLOAT * sequences,
        tokenizer=_tokenizer(store),
    )


def _tokenizer(store: WeightStore) -> int:
    tokens = store.file.metadata.length("tokenizer.ggml.tokens")
    return TOKENIZER + TOKEN * tokens if tokens else 0


def _shared(program: Program, context: int) -> int:
    """Of the largest forward whose rows threads share."""
    return 2 * SHARED_ROWS * -(-context // SPAN) * program.partials[1]


def plan(
    path: str,
    threads: int,
    repack: bool | None,
    context: int = CONTEXT,
    sequences: int = 1,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    state_type: str = "f32",
) -> dict[str, Any]:
    """Facts about running a model file, ready for JSON. Reads its header and no tensor."""
    if context < 1 or not 1 <= sequences <= MAX_ROWS:
        raise InvalidInput(
            f"{sequences} sequences of {context} tokens cannot be planned; give at least 1 token, "
            f"and 1 to {MAX_ROWS} sequences"
        )
    file = open_file(path)
    graph = models.build(file.metadata, file.tensors, file.path)
    types = cache_types(cache_type_k, cache_type_v)
    layout = Layout.of(graph, types, state_type_named(state_type))
    available = available_memory()
    store = WeightStore(file, lambda text: None, fits_panels(graph) if repack is None else repack)
    program = lower(graph, store, layout, MAX_ROWS)
    found = footprint(program, store, layout, threads, context, sequences)
    return {
        "file": str(file.path),
        "file_bytes": file.nbytes,
        "threads": threads,
        "repack": store.repack,
        "context": context,
        "sequences": sequences,
        "bytes": asdict(found),
        "state_type": layout.state_type,
        "state_bytes": layout.fixed_bytes,
        "state_bytes_per_token": layout.bytes_per_token,
        "total_bytes": found.total,
        "held_bytes": found.held,
        "peak_bytes": found.peak,
        "available_bytes": available,
    }


def fits_panels(graph: Graph) -> bool:
    """Whether panels take no more than their share of the memory that is available."""
    matrices = {
        value.name: panel_bytes(value)
        for node in graph.nodes
        for slot, value in node.operands.items()
        if isinstance(value, Weight)
        and node.op.operands[slot].kind is Kind.MATRIX
        and value.block in PANELS
    }
    available = available_memory()
    return available is None or sum(matrices.values()) <= SHARE * available


def parse_size(text: str | int) -> int:
    """Bytes from a number with or without K, M, G or T (powers of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise InvalidInput(f"{text!r} is no amount of memory; give one as 600M or 2G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def admission(path: Path, max_ram: str | int | None, context: int = 0) -> Admission:
    """A check that raises InvalidInput for what does not fit: better to say so than to swap.

    context: tokens of the sequence that it has to fit with; 0: as many as are taken for a text.
    """
    limit = None if max_ram is None else parse_size(max_ram)

    def check(program: Program, store: WeightStore, layout: Layout, threads: int) -> None:
        found = footprint(program, store, layout, threads, context or CONTEXT)
        available = available_memory()
        if limit is not None and found.held > limit:
            room, bound = limit, f"--max-ram allows {size(limit)}"
        elif available is not None and found.held > available:
            room, bound = available, f"{size(available)} of memory are available"
        else:
            return
        ways = ["use a smaller file, as one of 4 bits"]
        if found.panels and found.held - found.panels <= room:
            ways.insert(0, "leave the weights in the file (--no-repack)")
        if found.cache + found.shared > found.held // 4:
            ways.insert(0, "keep fewer tokens (-c)")
        raise InvalidInput(f"{path} takes {size(found.held)}, and {bound}: {', or '.join(ways)}")

    return check
