"""Every compiled kernel against its op's definition, alone in a graph.

A row's error is an L2 ratio: what is left is the order of sums and the last bits of exp, so the
tolerance is a few float32 roundings and does not grow with the sizes. Threads and random pauses
must not change a bit, of the output or of the state.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import numpy as np
import pytest

from harness import Case, Machine, Played, Tensors, error_ratio, no_notice, poison
from keelback.engine.backend import MAX_ROWS
from keelback.engine.cpu import CpuBackend
from keelback.engine.lowering import lower
from keelback.engine.state import Layout
from keelback.engine.weights import WeightStore
from keelback.kernels import jit, statetypes
from keelback.kernels.experts import SIGMOID, SOFTMAX
from keelback.kernels.formats.blocks import (
    BF16,
    F16,
    F32,
    NATIVE,
    Q4_0,
    Q4_K,
    Q6_K,
    Q8_0,
    QUANTIZED,
)
from keelback.kernels.formats.panels import pack
from keelback.kernels.norm import GATE_FIRST, NORM_FIRST
from keelback.kernels.op import FAMILIES, ShapeError, catalogue
from keelback.kernels.recurrence import GROUPED, TILED
from keelback.kernels.rotary import halves, neighbours
from keelback.models.graph import Graph

TOLERANCE = 2e-6
#: Where a state is rounded a last bit may make a step of it: such steps are few.
ROUNDED = {"bf16": 3e-4, "int8": 1e-2}
SIZES = (1, 3, 17, 31, 33, 63, 65, 257)
LENGTHS = (5, 1, 11, 2)
T = sum(LENGTHS)
#: Tokens that the sequences have read before; with LENGTHS they end in the middle, on and behind
#: the boundaries of pages.
PAST = (0, 63, 120, 257)

CASES: dict[str, Case] = {}


def normal(seed: Any, *shape: int) -> np.ndarray:
    """Seeded float32 of about unit size."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def uniform(seed: Any, low: float, high: float, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def case(name: str, op: str, **parts: Any) -> None:
    """Register a case, LENGTHS long unless it says otherwise."""
    assert name not in CASES
    CASES[name] = Case(catalogue()[op], **{"lengths": LENGTHS, **parts})


def _activations() -> None:
    for size in SIZES:
        x, y = 3 * normal((size, 1), T, size), normal((size, 2), T, size)
        for op in ("add", "swiglu", "multiply"):
            case(f"{op}-{size}", op, rows={"x": x, "y": y})
        case(f"add-scale-{size}", "add", rows={"x": x, "y": y}, attributes={"scale": 0.22})
        for op in ("scaled", "silu", "sigmoid", "softplus", "relu_squared"):
            case(f"{op}-{size}", op, rows={"x": x})
            bias = normal((size, 3), size)
            weights, attributes = {"bias": bias}, {"scale": 2}
            case(f"{op}-bias-{size}", op, rows={"x": x}, weights=weights, attributes=attributes)


def _gates() -> None:
    for size in SIZES:
        for gates in (1, 3, 3 * size):
            rows = {"x": normal((size, 44), T, 3 * size), "gate": 3 * normal(gates, T, gates)}
            name = f"gated-{gates}/{3 * size}"
            if name not in CASES:
                case(name, "gated", rows=rows)
        case(
            f"bounded_decay-3x{size}", "bounded_decay", rows={"x": normal((size, 45), T, 3 * size)},
            weights={"rate": uniform(size, 0.5, 8, 3), "bias": normal((size, 46), 3 * size)},
            attributes={"bound": 5, "heads": 3},
        )  # fmt: skip


def _columns() -> None:
    for size in SIZES:
        x, y = normal((size, 47), T, 3 * size), normal((size, 48), T, 51)
        case(f"join-{size}", "join", rows={"x": x, "y": y}, attributes={"groups": 3})
        for start, width in {(0, size), (size // 2, 1), (size - (size + 1) // 2, (size + 1) // 2)}:
            case(
                f"columns-{size}-{start}-{width}", "columns", rows={"x": x},
                attributes={"groups": 3, "start": start, "width": width},
            )  # fmt: skip


def _embeddings() -> None:
    sizes = {Q8_0: (32, 96, 288), Q4_0: (32, 96), Q4_K: (256, 768), Q6_K: (256, 768)}
    for block in (F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q6_K):
        for size in sizes.get(block, SIZES):
            ids = np.random.default_rng(size).integers(0, 23, T)
            table = (normal((size, 4), 23, size), block)
            case(
                f"embedding-{block.name}-{size}", "embedding",
                weights={"weight": table}, attributes={"width": size}, ids=ids,
            )  # fmt: skip
    for size in SIZES:
        for outputs in ([0], [3, 4, 18], list(range(T))):
            name = f"select-{len(outputs)}-{size}"
            case(name, "select", rows={"x": normal((size, 5), T, size)}, outputs=np.array(outputs))


def _linears() -> None:
    shapes = {block: tuple(zip(SIZES, reversed(SIZES), strict=True)) for block in (F32, F16, BF16)}
    # Rows of a quantized matrix come in whole blocks.
    for block in (Q8_0, Q4_0):
        shapes[block] = tuple(zip(SIZES, (32, 64, 96, 160, 256, 288, 32, 64), strict=True))
    for block in (Q4_K, Q6_K):
        shapes[block] = tuple(zip(SIZES, (256, 512, 256, 768, 256, 512, 256, 256), strict=True))
    for block, pairs in shapes.items():
        for i, (width, columns) in enumerate(pairs):
            # 1 to 8 rows and more: eight and four at a time, and all that can be left over.
            lengths = [(1,), (1, 1), (2, 1), (4,), (3, 2), (8,), (1, 6), LENGTHS][i]
            weights: dict[str, Any] = {"weight": (normal((width, 6), width, columns), block)}
            if i % 2:
                weights["bias"] = normal((width, 7), width)
            x = normal((columns, 8), sum(lengths), columns)
            case(
                f"linear-{block.name}-{width}x{columns}", "linear",
                rows={"x": x}, weights=weights, attributes={"width": width}, lengths=lengths,
            )  # fmt: skip


def _quantized() -> None:
    x = normal(9, T, 96)
    x[3], x[4, :32], x[5, 40] = 0, 0, 1e4
    case("quantize-96", "quantize", rows={"x": x})
    case("quantize-parts", "quantize", rows={"x": x}, attributes={"parts": 3})
    # Halves are where rounding to even shows: 127 is the largest of every block.
    steps = np.tile(np.float32([127, *(n + 0.5 for n in range(-15, 16))]), (T, 1))
    case("quantize-ties", "quantize", rows={"x": steps})


def _norms() -> None:
    for size in SIZES:
        for groups in (1, 3):
            width = size * groups
            x, gate = normal((width, 10), T, width), 2 * normal((width, 11), T, width)
            x[2] *= 1e-3
            for order in (0, GATE_FIRST, NORM_FIRST):
                rows = {"x": x, "gate": gate} if order else {"x": x}
                # None, one for the row, one that every group uses.
                weights = {
                    0: {},
                    GATE_FIRST: {"weight": normal(12, width)},
                    NORM_FIRST: {"weight": normal(13, size)},
                }
                attributes = {"eps": 1e-5, "groups": groups, "order": order}
                case(
                    f"rms_norm-{order}-{groups}x{size}", "rms_norm",
                    rows=rows, weights=weights[order], attributes=attributes,
                )  # fmt: skip
            attributes = {"eps": 1e-6, "groups": groups, "scale": 0.37}
            case(f"l2_norm-{groups}x{size}", "l2_norm", rows={"x": x}, attributes=attributes)


def _convolutions() -> None:
    for i, size in enumerate(SIZES):
        for taps in (1, 2, 4, 5):
            weights = {"weight": normal((size, 14), size, taps)}
            if i % 2:
                weights["bias"] = normal((size, 15), size)
            case(
                f"causal_conv-{taps}-{size}", "causal_conv",
                rows={"x": normal((size, 16), T, size)}, weights=weights,
                states={"window": normal((size, 17), len(LENGTHS), taps - 1, size)},
                attributes={"taps": taps, "silu": taps % 2},
            )  # fmt: skip


def _typed(name: str, op: str, narrow: bool, **parts: Any) -> None:
    """A case whose state is float32, and where `narrow` one for every other type of a state."""
    past = PAST[: len(parts.get("lengths", LENGTHS))]
    for kind in statetypes.STATE_TYPES.values():
        if kind is statetypes.F32:
            case(name, op, **parts)
        elif narrow:
            case(f"{name}-{kind.name}", op, state_type=kind, past=past, **parts)


def _scans() -> None:
    for size, n in zip(SIZES, (16, 1, 5, 16, 8, 3, 17, 16), strict=True):
        _typed(
            f"selective_scan-{n}-{size}", "selective_scan", size in (17, 65),
            rows={
                "x": normal((size, 18), T, size), "dt": uniform((size, 19), 1e-3, 0.5, T, size),
                "b": normal((n, 20), T, n), "c": normal((n, 21), T, n),
            },
            weights={"a": -uniform((size, 22), 0.5, 8, size, n), "d": normal((size, 23), size)},
            states={"state": normal((size, 24), len(LENGTHS), n, size)},
            attributes={"d_state": n},
        )  # fmt: skip


def _recurrences() -> None:
    shapes = (
        (1, 1, 1, 1), (2, 1, 3, 17), (3, 3, 17, 31), (4, 2, 33, 3), (6, 3, 31, 33), (2, 2, 65, 63),
        (1, 1, 3, 257), (1, 1, 512, 70),
    )  # fmt: skip
    for decay in ("head", "key"):
        for erase in ("none", "tied"):
            for i, (heads, key_heads, d_key, d_value) in enumerate(shapes):
                # Decays by key are worked out some rows ahead; the last ones are more than that.
                lengths = LENGTHS if i < 5 else (35, 2)
                rows = sum(lengths)
                # Keys of length 1, as the delta rule wants them: longer ones make it diverge.
                k = normal((i, 25), rows, key_heads, d_key)
                k = (k / np.linalg.norm(k, axis=2, keepdims=True)).reshape(rows, -1)
                decays = heads * (d_key if decay == "key" else 1)
                dt = uniform((i, 30), 1e-3, 0.5, rows, decays)
                # Without a rate, the logarithm of the decay itself.
                weights = {"a": -uniform((i, 26), 0.2, 2, heads)} if i % 4 < 3 else {}
                if i % 2:
                    weights["d"] = normal((i, 27), heads)
                mapping = TILED if i % 3 else GROUPED
                _typed(
                    f"recurrence-{decay}-{erase}-{heads}/{key_heads}-{d_key}x{d_value}",
                    "recurrence",
                    i in (1, 7),
                    rows={
                        "q": normal((i, 28), rows, key_heads * d_key), "k": k,
                        "v": normal((i, 29), rows, heads * d_value),
                        "dt": dt if "a" in weights else -dt,
                        "beta": uniform((i, 31), 0.05, 1, rows, heads),
                    },
                    weights=weights,
                    states={"state": normal((i, 32), len(lengths), heads, d_key, d_value)},
                    attributes={
                        "heads": heads, "key_heads": key_heads, "mapping": mapping,
                        "decay": decay, "erase": erase,
                    },
                    lengths=lengths,
                )  # fmt: skip


def _attentions() -> None:
    for kind in (F32, F16, Q8_0):
        for size in (32, 64, 160) if kind is Q8_0 else SIZES:
            for heads in (1, 3):
                width = heads * size
                pages = [normal((size, 33, i), n, width) for i, n in enumerate(PAST)]
                case(
                    f"store-{kind.name}-{heads}x{size}", "store",
                    rows={"x": 3 * normal((size, 34), T, width)}, caches={"cache": pages},
                    heads=heads, past=PAST, types={"k": kind, "v": kind},
                )  # fmt: skip
    shapes = (
        (1, 1, 1, 1), (2, 1, 3, 17), (3, 3, 17, 31), (4, 2, 33, 3), (6, 2, 16, 16), (5, 1, 65, 63),
        (2, 2, 3, 257), (1, 1, 257, 8), (14, 2, 64, 64), (35, 1, 64, 80),
    )  # fmt: skip
    for i, shape in enumerate(shapes):
        _attention(f"{i}", i, *shape)
        _attention(f"window-{i}", i, *shape, window=(1, 3, 64, 70)[i % 4])
    kinds = (F32, F16, Q8_0)
    for i, (keys, values) in enumerate(itertools.product(kinds, kinds)):
        types = {"k": keys, "v": values}
        _attention(f"{keys.name}-{values.name}", i, 6, 2, 64, 32, types=types)
        # One row a sequence: threads share the tokens that it reads.
        _attention(
            f"long-{keys.name}-{values.name}", i, 7, 1, 32, 96, types=types, lengths=(1, 1, 1),
            past=(1100, 511, 0),
        )  # fmt: skip
    _attention("spans", 1, 4, 2, 32, 32, lengths=(300, 2), past=(900, 63))
    _attention("spans-window", 2, 4, 2, 32, 32, lengths=(1, 2), past=(1700, 700), window=600)
    for kind in kinds:
        types = {"k": kind, "v": kind}
        _attention(f"latent-{kind.name}", 3, 5, 1, 96, 0, first=64, types=types)


def _attention(
    name: str, seed: int, heads: int, key_heads: int, d_key: int, d_value: int, window: int = 0,
    **parts: Any,
) -> None:  # fmt: skip
    lengths, past = parts.get("lengths", LENGTHS), parts.get("past", PAST)
    held = [n + more for n, more in zip(past, lengths, strict=True)]
    caches = {"keys": [normal((seed, 36, j), n, key_heads * d_key) for j, n in enumerate(held)]}
    if d_value:
        width = key_heads * d_value
        caches["values"] = [normal((seed, 37, j), n, width) for j, n in enumerate(held)]
    sizes = {"heads": heads, "key_heads": key_heads}
    case(
        f"attention-{name}", "attention",
        rows={"q": 3 * normal((seed, 35), sum(lengths), heads * d_key)}, caches=caches,
        heads=key_heads, attributes={**sizes, "scale": d_key**-0.5, "window": window},
        **{"past": PAST, **parts},
    )  # fmt: skip


def _rotaries() -> None:
    styles = {"halves": halves, "neighbours": neighbours}
    for i, (heads, d_head, count) in enumerate(((1, 2, 2), (3, 5, 4), (2, 33, 32), (5, 65, 64))):
        x, past = normal((i, 38), T, heads * d_head), (0, 1, 4095, 1 << 20)
        common = {"heads": heads, "ratio": 10000.0 ** (-2 / count)}
        for style, pairs in styles.items():
            case(
                f"rotary-{style}-{heads}x{d_head}-{count}", "rotary", rows={"x": x}, past=past,
                attributes=common | pairs(count),
            )  # fmt: skip
    apart = {"heads": 3, "count": 6, "step": 2, "gap": 6, "ratio": 0.3}
    stretched = {"scale": 0.25, "low": 0.4, "high": 1.7, "magnitude": 1.3}
    factors = {"factors": uniform(43, 0.5, 4, 3)}
    for name, more, weights in (
        ("apart", {}, {}), ("first", {"first": 1}, {}), ("stretched", stretched, {}),
        ("step", {"scale": 0.25, "low": 1, "high": 1}, {}), ("factors", {"first": 1}, factors),
        ("all", stretched | {"first": 1}, factors),
    ):  # fmt: skip
        case(
            f"rotary-{name}", "rotary", rows={"x": normal(39, T, 42)}, past=PAST,
            attributes=apart | more, weights=weights,
        )  # fmt: skip


#: Experts, and how many of them are used.
MIXTURES = ((1, 1), (3, 3), (17, 4), (64, 22), (256, 8))


def _routers() -> None:
    forms: dict[str, dict[str, Any]] = {
        "softmax": {}, "raw": {"normalise": 0}, "sigmoid": {"gating": SIGMOID, "eps": 1e-2},
        "scaled": {"gating": SIGMOID, "normalise": 0, "scale": 2.5},
    }  # fmt: skip
    for experts, used in MIXTURES:
        scores = 2 * normal((experts, 40), T, experts)
        # Ties, and what is too small to be told from nothing.
        scores[3], scores[4, ::2], scores[5, : experts - used] = 0, scores[4].max(), -3e4
        bias = 0.3 * normal((experts, 43), experts)
        for form, attributes in forms.items():
            for groups, groups_used in ((1, 1), (8, 3)):
                if experts < 8 * groups - 7 or experts % groups:
                    continue
                attributes = {**attributes, "used": used, "groups": groups}
                attributes["groups_used"] = groups_used
                for weights in ({}, {"bias": bias}):
                    name = f"route-{form}{'-bias' if weights else ''}-{used}/{experts}/{groups}"
                    case(
                        name, "route", rows={"scores": scores}, weights=weights,
                        attributes=attributes,
                    )  # fmt: skip


def routes(seed: int, rows: int, experts: int, used: int) -> np.ndarray:
    """Different experts for every row, and their strengths; the first is everyone's favourite."""
    liked = normal((seed, 49), rows, experts)
    liked[:, 0] += 2
    chosen = np.argsort(-liked, axis=1)[:, :used]
    return np.concatenate([chosen, uniform(seed, 0, 1, rows, used)], axis=1).astype(np.float32)


def _experts() -> None:
    # More than what is put side by side at once, and some left over.
    lengths = (70, 1, 9)
    shapes = {(5, 2): (17, 33), (3, 3): (257, 3), (65, 8): (8, 65), (1, 1): (1, 31)}
    whole = {Q8_0: 64, Q4_0: 32, Q4_K: 256, Q6_K: 512}
    for block in (F32, F16, BF16, *whole):
        for (experts, used), (width, columns) in shapes.items():
            columns = whole.get(block, columns)
            weights = {"weight": (normal((width, 41), experts, width, columns), block)}
            sizes = {"width": width, "used": used, "experts": experts}
            shape = f"{block.name}-{experts}x{width}x{columns}"
            for parts in {1, used}:
                x = normal((width, 42), sum(lengths), parts * columns)
                case(
                    f"expert_linear-{parts}/{used}-{shape}", "expert_linear",
                    rows={"x": x, "routes": routes(width, sum(lengths), experts, used)},
                    weights=weights, attributes=sizes | {"parts": parts}, lengths=lengths,
                )  # fmt: skip
            if experts < 65:
                case(
                    f"expert_linear-heads-{shape}", "expert_linear", lengths=lengths,
                    rows={"x": normal((width, 50), sum(lengths), experts * columns)},
                    attributes=sizes | {"used": experts, "parts": experts}, weights=weights,
                )  # fmt: skip
    for size in SIZES:
        x = normal((size, 51), T, 4 * size)
        rows = {"x": x, "routes": routes(size, T, 17, 4)}
        case(f"expert_sum-{size}", "expert_sum", rows=rows, attributes={"used": 4})


for _register in (
    _activations, _gates, _columns, _embeddings, _linears, _quantized, _norms, _convolutions,
    _scans, _recurrences, _attentions, _rotaries, _routers, _experts,
):  # fmt: skip
    _register()


@pytest.mark.parametrize("name", CASES)
def test_kernel_agrees_with_its_definition_whatever_the_threads(name):
    tried = CASES[name]
    defined = tried.play(tried.machine("numpy"))
    machine, tolerance = tried.machine(), ROUNDED.get(tried.state_type.kernel, TOLERANCE)
    alone = tried.play(machine)
    if tried.op.name == "quantize":
        # Bytes and scales in float32 slots, for which there is one right answer.
        assert np.array_equal(alone.rows.view(np.uint8), defined.rows.view(np.uint8))
    elif tried.op.name == "route":
        used = tried.attributes["used"]
        assert np.array_equal(alone.rows[:, :used], defined.rows[:, :used])
        assert error_ratio(alone.rows[:, used:], defined.rows[:, used:]) < TOLERANCE
    else:
        assert error_ratio(alone.rows, defined.rows) < tolerance
    for got, want in zip(alone.tensors, defined.tensors, strict=True):
        for name in want:
            assert error_ratio(got[name].reshape(1, -1), want[name].reshape(1, -1)) < tolerance
    for got, want in zip(alone.cached, defined.cached, strict=True):
        assert np.array_equal(got, want)
    for threads in (1, 2, 3):
        for delay in (0, 1, 2):
            assert tried.play(machine, threads, delay).same_bits(alone), (threads, delay)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "weight" in case.weights])
def test_weights_that_stay_as_they_are_give_the_same_bits(name):
    tried = CASES[name]
    packed = tried.play(tried.machine())
    for threads in (1, 3):
        assert tried.play(tried.machine(repack=False), threads).same_bits(packed)


def _in_pieces(tried: Case, machine: Machine, cuts: np.random.Generator) -> Played:
    """A case in many forwards, its sequences cut at random."""
    count, states = len(tried.lengths), tried.begin(machine)
    parts = np.split(np.arange(sum(tried.lengths)), np.cumsum(tried.lengths)[:-1])
    left = [np.split(ids, np.flatnonzero(cuts.random(len(ids)) < 0.2)) for ids in parts]
    rows: list[list[np.ndarray]] = [[] for _ in parts]
    while any(left):
        poison(machine.backend)
        here = [i for i in range(count) if left[i] and cuts.random() < 0.7]
        pieces = {i: left[i].pop(0) for i in here}
        here = [i for i in here if len(pieces[i])]
        if here:
            ids, beside = [pieces[i] for i in here], [states[i] for i in here]
            found = np.split(machine.forward(ids, beside), np.cumsum([len(p) for p in ids])[:-1])
            for i, part in zip(here, found, strict=True):
                rows[i].append(part)
    whole = np.concatenate([part for parts in rows for part in parts])
    return Played(whole, [state.block for state in states], [], [])


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith(("expert", "recurrence"))]
)
def test_pieces_give_the_bits_of_one_forward(name):
    tried = CASES[name]
    machine = tried.machine()
    whole, random = tried.play(machine), np.random.default_rng(len(name))
    for _ in range(3):
        assert _in_pieces(tried, machine, random).same_bits(whole)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gating", [SOFTMAX, SIGMOID])
def test_a_router_names_different_experts_whatever_the_scores(gating, biased, groups):
    # A number out of range would be read from, or written to, outside of the matrices.
    scores = normal(52, 8, 40)
    for row, value in enumerate((np.nan, np.inf, -np.inf, np.finfo(np.float32).min, 1e-45)):
        scores[row] = value
    scores[5, ::3], scores[6, 1::2], scores[7, :39] = np.nan, -np.inf, np.nan
    bias = np.where(np.arange(40) % 7, 0, np.float32(-np.inf))
    tried = Case(
        catalogue()["route"], rows={"scores": scores}, weights={"bias": bias} if biased else {},
        attributes={"used": 12, "gating": gating, "groups": groups, "groups_used": groups // 2 + 1},
        lengths=(8,),
    )  # fmt: skip
    for chosen in tried.play(tried.machine()).rows[:, :12]:
        assert set(chosen) <= set(range(40)) and len(set(chosen)) == 12


@pytest.mark.parametrize("block", sorted(QUANTIZED, key=lambda block: block.name))
@pytest.mark.parametrize("shape", [(16, 256), (1, 512), (37, 256), (3, 21, 256)])
def test_panels_are_packed_as_they_are_defined(block, shape):
    graph, tensors = Graph(), Tensors()
    weight = tensors.add("weight", normal(40, *shape), block)
    rows = graph.embedding(tensors.add("rows", normal(41, 3, 256)), width=256)
    store = WeightStore(tensors, no_notice)
    stored = store.get(weight, catalogue()["linear"].operands["weight"])
    matrix = tensors.add("matrix", normal(42, 16, 256))
    graph.finish(graph.select(graph.linear(rows, matrix, width=16)))
    CpuBackend(graph, store, Layout.of(graph), 2, no_notice).load()
    wanted = pack(tensors.data(tensors.tensors["weight"]), block, shape)
    assert np.array_equal(stored.data, wanted)


def test_cases_cover_every_op_and_every_compiled_variant():
    for family in FAMILIES:
        importlib.import_module(f"keelback.kernels.{family}_cpu")
    # Other tests bring kernels of their own.
    ours = {
        name for name, kernel in jit._KERNELS.items() if kernel.__module__.startswith("keelback.")
    }
    played = set()
    for tried in CASES.values():
        graph, tensors = tried.build()
        for repack in (True, False):
            store = WeightStore(tensors, no_notice, repack)
            layout = Layout.of(graph, tried.types, tried.state_type)
            program = lower(graph, store, layout, MAX_ROWS)
            played |= {name for name, _ in program.kernels}
    assert {tried.op.name for tried in CASES.values()} == set(catalogue())
    packers = {f"pack.{block.name.lower()}" for block in QUANTIZED}
    assert played == ours - {"post", "lead", "serve", "probe"} - packers
    assert {F32, F16, BF16} | QUANTIZED == NATIVE


def test_a_matrix_whose_rows_have_another_length_is_refused():
    # With one column the shape [1, 5] has as many numbers as [5, 1], and rows five times as long.
    graph, tensors = Graph(), Tensors()
    row = np.zeros((1, 5), np.float32)
    one = graph.embedding(tensors.add("rows", row.T), width=1)
    with pytest.raises(ShapeError):
        graph.linear(one, tensors.add("wide", row), width=5)
    with pytest.raises(ShapeError):
        graph.embedding(tensors.add("flat", row[0]), width=1)
    assert graph.linear(one, tensors.add("tall", row.T), width=5).width == 5


# ---- elementary functions

EXTREMES = (-1e4, -90.0, -87.4, -20.0, -1e-8, 0.0, 1e-8, 20.0, 20.0001, 87.4, 90.0, 1e4)
SMALLEST = float(np.finfo(np.float32).tiny)
#: exp is good for 2 ulp, and each of the functions made of it adds a rounding or two.
ULPS = 5


def sweep() -> np.ndarray:
    """Inputs (T, 257) dense around 0, wide beyond, with the extremes in front."""
    wide = np.linspace(-100, 100, 5 * 257, dtype=np.float32)
    tiny = np.geomspace(1e-30, 1, 257, dtype=np.float32)
    near = np.linspace(-2, 2, 7 * 257, dtype=np.float32)
    values = np.concatenate([wide, tiny, -tiny, near]).reshape(-1, 257)
    values[0, : len(EXTREMES)] = EXTREMES
    return values


def _close(got: np.ndarray, want: np.ndarray) -> None:
    """Within ULPS of float64's answer; a factor that is no normal float32 may count as 0."""
    assert np.isfinite(got).all()
    error = np.abs(got.astype(np.float64) - want)
    bound = ULPS * np.finfo(np.float32).eps / 2 * np.abs(want) + 100 * SMALLEST
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), (worst, got[worst], want[worst])


def _exact_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


FUNCTIONS = {
    "sigmoid": _exact_sigmoid,
    "silu": lambda x: x * _exact_sigmoid(x),
    "softplus": lambda x: np.where(x > 20, x, np.logaddexp(0, x)),
}


def _play_unary(op: str, x: np.ndarray) -> np.ndarray:
    tried = Case(catalogue()[op], rows={"x": x}, lengths=(len(x),))
    return tried.play(tried.machine()).rows


@pytest.mark.parametrize("op", FUNCTIONS)
def test_functions_agree_with_float64_over_all_of_their_range(op):
    x = sweep()
    _close(_play_unary(op, x), FUNCTIONS[op](x.astype(np.float64)))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_nan_goes_through_as_nan_and_stays_in_its_lane(op):
    x = np.linspace(-3, 3, 35, dtype=np.float32).reshape(1, 35)
    x[0, [0, 15, 16, 34]] = np.nan
    assert np.array_equal(np.isnan(_play_unary(op, x)), np.isnan(x))


def test_exp_agrees_with_float64_over_all_of_its_range():
    # One step of a scan from a state of ones, with nothing written, is exp(dt a).
    x = sweep()
    x = x[:, :200].reshape(-1)[None]
    x = np.clip(x, -1e4, 88)
    ones, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    tried = Case(
        catalogue()["selective_scan"],
        rows={"x": 0 * x, "dt": x, "b": zero, "c": ones},
        weights={"a": np.ones((x.size, 1), np.float32), "d": np.zeros(x.size, np.float32)},
        states={"state": np.ones((1, 1, x.size), np.float32)},
        attributes={"d_state": 1},
    )
    _close(tried.play(tried.machine()).rows, np.exp(x.astype(np.float64)))
