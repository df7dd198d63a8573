"""Cases of ops on rows: all but those with matrices, which are in `weight_cases.py`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from cases import CASES, LENGTHS, SIZES, T, case, normal, routes, uniform

from keelback.kernels import statetypes
from keelback.kernels.experts import SIGMOID
from keelback.kernels.formats.blocks import F16, F32, Q8_0
from keelback.kernels.norm import GATE_FIRST, NORM_FIRST
from keelback.kernels.recurrence import GROUPED, TILED
from keelback.kernels.rotary import halves, neighbours

#: Tokens that the sequences have read before; with LENGTHS they end in the middle, on and behind
#: the boundaries of pages.
PAST = (0, 63, 120, 257)


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


def _selected() -> None:
    for size in SIZES:
        for outputs in ([0], [3, 4, 18], list(range(T))):
            name = f"select-{len(outputs)}-{size}"
            case(name, "select", rows={"x": normal((size, 5), T, size)}, outputs=np.array(outputs))


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
            _convolution(f"{taps}-{size}", size, taps, biased=i % 2 == 1)
    # A prompt, in blocks of its rows; windows of less than a block, and of more.
    for taps in (4, 33, 34, 70):
        _convolution(f"{taps}-prompt", 65, taps, biased=True, lengths=(70, 1, 33))


def _convolution(name: str, size: int, taps: int, biased: bool, lengths=LENGTHS) -> None:
    weights = {"weight": normal((size, 14), size, taps)}
    if biased:
        weights["bias"] = normal((size, 15), size)
    case(
        f"causal_conv-{name}", "causal_conv",
        rows={"x": normal((size, 16), sum(lengths), size)}, weights=weights, lengths=lengths,
        states={"window": normal((size, 17), len(lengths), taps - 1, size)},
        attributes={"taps": taps, "silu": taps % 2},
    )  # fmt: skip


def _typed(name: str, op: str, **parts: Any) -> None:
    """A case for every type that matrices of states are kept in."""
    for kind in statetypes.STATE_TYPES.values():
        ending = "" if kind is statetypes.F32 else f"-{kind.name}"
        past = PAST[: len(parts.get("lengths", LENGTHS))]
        case(name + ending, op, **{"state_type": kind, "past": past, **parts})


def _scans() -> None:
    for size, n in zip(SIZES, (16, 1, 5, 16, 8, 3, 17, 16), strict=True):
        _typed(
            f"selective_scan-{n}-{size}", "selective_scan",
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


def _sums() -> None:
    for size in SIZES:
        x = normal((size, 51), T, 4 * size)
        rows = {"x": x, "routes": routes(size, T, 17, 4)}
        case(f"expert_sum-{size}", "expert_sum", rows=rows, attributes={"used": 4})


def _importance() -> None:
    for size in SIZES:
        for matrices, used, parts in ((1, 1, 1), (5, 2, 1), (5, 2, 2), (3, 3, 3)):
            rows = {"x": normal((size, 53), T, parts * size)}
            if used < matrices:
                rows["routes"] = routes(size, T, matrices, used)
            sums = uniform((size, 54), 0, 9, len(LENGTHS), matrices, size + 1)
            attributes = {"matrices": matrices, "used": used, "parts": parts}
            case(
                f"sum_squares-{matrices}/{used}/{parts}-{size}", "sum_squares",
                rows=rows, states={"sums": sums}, attributes=attributes,
            )  # fmt: skip


for _register in (
    _activations, _gates, _columns, _selected, _quantized, _norms, _convolutions, _scans,
    _recurrences, _attentions, _rotaries, _routers, _sums, _importance,
):  # fmt: skip
    _register()
