"""Causal attention over KV pages: rows are first stored there, then read back by all heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .formats.blocks import F32, Q8_0, BlockFormat
from .op import CACHE, ROWS, Op, ShapeError
from .rounding import round_blocks

#: Tokens whose scores are taken together, and tokens whose sums are. Sums go over both in ascending
#: order, and both begin at multiples of their length: it does not matter how tokens arrived.
TILE, SPAN = 64, 512
#: Queries of a key head that go through a tile one after another.
QUERIES = 16


def encode(rows: np.ndarray, block: BlockFormat) -> np.ndarray:
    """Keys or values as the pages keep them: (..., D) float32 -> (..., bytes) uint8.

    F32, F16 (rounded to the nearest, ties to even), or Q8_0, as `round_blocks` has it.
    """
    if block is not Q8_0:
        kind = np.float32 if block is F32 else np.float16
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(rows.astype(kind)).view(np.uint8)
    q, units = round_blocks(rows)
    with np.errstate(over="ignore"):
        scales = units[..., None].astype(np.float16).view(np.uint8)
    parts = np.concatenate([scales, q.view(np.uint8)], axis=-1)
    return parts.reshape(*rows.shape[:-1], block.row_bytes(rows.shape[-1]))


def decode(data: np.ndarray, block: BlockFormat) -> np.ndarray:
    """What `encode` kept: (..., bytes) uint8 -> (..., D) float32."""
    if block is not Q8_0:
        return data.view(np.float32 if block is F32 else np.float16).astype(np.float32)
    *outer, size = data.shape
    parts = data.reshape(*outer, size // block.nbytes, block.nbytes)
    scales = np.ascontiguousarray(parts[..., :2]).view(np.float16).astype(np.float32)
    values = scales * parts[..., 2:].view(np.int8)
    return values.reshape(*outer, size // block.nbytes * block.elements)


def _store_shape(x: Any, cache: Any) -> int:
    if x.width != cache.width:
        raise ShapeError(f"rows of {x.width} values cannot be stored in {cache.name}")
    return 0


def store(x: np.ndarray, cache: Any) -> np.ndarray:
    """Append rows to the KV pages; ops behind this one read them from there.

    x: (T, heads * D), rows of one sequence. cache: a view of its pages. Returns (T, 0).
    """
    cache.write(x)
    return np.zeros((len(x), 0), np.float32)


def _attention_shape(
    q: Any, keys: Any, values: Any, *, heads: int, key_heads: int, scale: float, window: int = 0
) -> int:
    if heads % key_heads or q.width % heads or (keys.heads, values.heads) != (key_heads, key_heads):
        raise ShapeError(f"{keys.name}: {heads} heads do not share {key_heads} key heads evenly")
    if max(keys.used - keys.d_head, values.used - values.d_head, -window) > 0:
        raise ShapeError(f"{keys.name}: more values of a head are read than there are")
    if q.width // heads != keys.used:
        raise ShapeError(
            f"{keys.name}: queries of {q.width} values in {heads} heads do not meet keys of "
            f"{keys.width} in {key_heads}"
        )
    return values.used * heads


def attention(
    q: np.ndarray,
    keys: Any,
    values: Any,
    *,
    heads: int,
    key_heads: int,
    scale: float,
    window: int = 0,
) -> np.ndarray:
    """softmax(scale q K^T) V over all tokens up to the row's own, head by head.

    q: (T, heads * K), the last rows that one sequence has stored. keys: its pages, key_heads * K
    values a token. values: key_heads * V, which may be the first ones of the keys. Head h reads key
    head h // (heads / key_heads) (grouped queries, arXiv 2305.13245). window: where it is not 0,
    the row's own token and those before it that are read. Returns (T, heads * V).
    """
    group = heads // key_heads
    out = []
    for t, row in enumerate(q.reshape(len(q), key_heads, group, -1).astype(np.float64)):
        count = keys.position + t + 1
        start = max(0, count - window) if window else 0
        k, v = (cache.read(count)[start:] for cache in (keys, values))
        k, v = (part.reshape(count - start, key_heads, -1) for part in (k, v))
        scores = scale * np.einsum("kgd,nkd->kgn", row, k)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        out.append(np.einsum("kgn,nkd->kgd", weights, v).reshape(-1))
    return np.array(out, np.float32)


def padded(width: int) -> int:
    """Floats of whole vectors that hold `width`."""
    return (width + 15) // 16 * 16


def record_floats(d_value: int) -> int:
    """What a span leaves of a head: the largest score, the sum of weights, and the output."""
    return 16 + d_value


def _scratch(operands: Mapping[str, Any], attributes: Mapping[str, Any], rows: int) -> int:
    """Bytes: scores, five numbers a query, queries, and outputs of a span and of all spans."""
    d_key, d_value = (padded(operands[slot].used) for slot in ("keys", "values"))
    return 4 * (4 * TILE + QUERIES * (5 + d_key + 2 * d_value))


def _partials(operands: Mapping[str, Any], attributes: Mapping[str, Any]) -> tuple[int, int]:
    heads = attributes["heads"]
    return heads, heads * 4 * record_floats(padded(operands["values"].used))


def _types(operands: Mapping[str, Any], attributes: Mapping[str, Any]) -> str:
    """Kernels are chosen by the types of the caches."""
    caches = [operands[slot] for slot in ("cache", "keys", "values") if slot in operands]
    return "_".join(cache.block.name.lower() for cache in caches)


OPS = (
    Op("store", {"x": ROWS, "cache": CACHE}, _store_shape, store, (), _types),
    Op(
        "attention",
        {"q": ROWS, "keys": CACHE, "values": CACHE},
        _attention_shape,
        attention,
        ("heads", "key_heads", "scale", "window"),
        _types,
        _scratch,
        _partials,
    ),
)
