"""Numba kernels of `attention.py`: grids of queries and keys, softmax carried from tile to tile.

The softmax is carried on as in arXiv 1805.02867: with every tile the sums so far are scaled down to
its largest score. A row goes through tiles of 64 tokens and spans of 512, which begin at absolute
positions, in ascending order, whatever came with it. A thread takes some rows of a key head through
all spans; where there are few rows, threads take spans, and the last one done adds them up.
"""

from __future__ import annotations

import numpy as np

from .access import (
    address,
    claim,
    first_row,
    integer,
    number,
    page,
    partials_of,
    position,
    rows,
    scratch_of,
    sequence_of,
    sequences,
    span_stride,
    spans_done,
    stride,
    width,
)
from .attention import QUERIES, SPAN, TILE, padded, record_floats
from .attention_tiles import LARGEST, TOTAL, WHOLE_LARGEST, WHOLE_TOTAL, tile_of
from .elementary import exp
from .halves import store_half, store_halves
from .intrinsics import (
    LANES,
    f32,
    load,
    load_first,
    max_lanes,
    maximum,
    splat,
    store,
    store_bytes,
    store_first,
)
from .jit import inline, kernel
from .processor import atomic_add
from .rounding_cpu import round_block
from .strips import first_lane

OUT, X, CACHE = 0, 1, 2
Q, KEYS, VALUES = 1, 2, 3
FLOAT = 4
ZERO, INFINITY = np.float32(0), np.float32(np.inf)
#: Floats of a thread's scratch memory in front of queries and outputs: scores of four queries, and
#: five numbers of every query.
SCORES, STATS = 4 * TILE, 5 * QUERIES

whole_vectors, record = inline(padded), inline(record_floats)


# ---- what is stored


def _store(kind, put):
    @kernel(f"store.{kind}")
    def store_rows(op, context, thread, threads):
        d_head = width(op, CACHE)
        heads = width(op, X) // d_head
        row = claim(op, context)
        while row < rows(op, context):
            sequence = sequence_of(context, row)
            token = position(context, sequence) + row - first_row(context, sequence)
            source = address(op, context, X) + row * stride(op, X)
            target = page(op, context, CACHE, sequence, token)
            for _ in range(heads):
                put(source, target, d_head)
                source, target = source + FLOAT * d_head, target + TILE * stride(op, CACHE)
            row = claim(op, context)


@inline
def put_floats(source, target, columns):
    """Whole vectors, the last one filled up with zeros."""
    for column in range(0, columns, LANES):
        value = load_first(source + FLOAT * column, min(LANES, columns - column))
        store(target + FLOAT * column, value)


@inline
def put_halves(source, target, columns):
    for column in range(0, columns, LANES):
        value = load_first(source + FLOAT * column, min(LANES, columns - column))
        store_halves(target + 2 * column, value)


@inline
def put_bytes(source, target, columns):
    for _ in range(columns // 32):
        unit, low, high = round_block(source)
        store_half(target, unit)
        store_bytes(target + 2, low)
        store_bytes(target + 2 + LANES, high)
        source, target = source + FLOAT * 32, target + 34


# ---- a unit: up to QUERIES queries of one key head


@inline
def clear(address, floats):
    for at in range(0, floats, LANES):
        store(address + FLOAT * at, splat(ZERO))


@inline
def places_of(count):
    """Places that the queries of a row take: three go through a grid of four."""
    return count + 1 if count % 4 == 3 else count


@inline
def take_queries(op, context, row, head, count, scale, d_key, target):
    """Copy the queries of `count` heads of a row, times the scale, filled up with zeros."""
    clear(target + FLOAT * d_key * count, (places_of(count) - count) * d_key)
    columns = width(op, Q) // integer(op, 0)
    source = address(op, context, Q) + row * stride(op, Q) + FLOAT * head * columns
    for _ in range(count):
        for column in range(0, d_key, LANES):
            lanes = min(LANES, max(0, columns - column))
            store(target + FLOAT * column, load_first(source + FLOAT * column, lanes) * scale)
        source, target = source + FLOAT * columns, target + FLOAT * d_key


@inline
def add_span(largest, total, out, stats, query, whole, d_value):
    """Add what a span has come to for a query to what those before it have."""
    if total != ZERO:
        before = f32(stats)[WHOLE_LARGEST * QUERIES + query]
        both = max_lanes(maximum(splat(before), splat(largest)))
        old, new = exp(splat(before - both)), exp(splat(largest - both))
        for column in range(0, d_value, LANES):
            at = FLOAT * column
            store(whole + at, load(whole + at) * old + load(out + at) * new)
        sums = splat(f32(stats)[WHOLE_TOTAL * QUERIES + query]) * old + splat(total) * new
        f32(stats)[WHOLE_TOTAL * QUERIES + query] = first_lane(sums)
        f32(stats)[WHOLE_LARGEST * QUERIES + query] = both


@inline
def begin(stats, whole, count, d_value):
    for query in range(count):
        f32(stats)[WHOLE_LARGEST * QUERIES + query] = -INFINITY
        f32(stats)[WHOLE_TOTAL * QUERIES + query] = ZERO
    clear(whole, count * d_value)


@inline
def finish(op, context, row, head, count, stats, query, whole, d_value):
    """Write the outputs of `count` heads of a row."""
    columns = width(op, VALUES)
    target = address(op, context, OUT) + row * stride(op, OUT) + FLOAT * head * columns
    for i in range(count):
        total = splat(f32(stats)[WHOLE_TOTAL * QUERIES + query + i])
        for column in range(0, columns, LANES):
            value = load(whole + FLOAT * column) / total
            store_first(target + FLOAT * column, value, min(LANES, columns - column))
        whole, target = whole + FLOAT * d_value, target + FLOAT * columns


# ---- a row that threads share


@inline
def records_of(op, context, row, head, d_value):
    """Address of what the spans of a head of a row have come to, and bytes of one."""
    size = FLOAT * record(d_value)
    step = span_stride(context) * size
    return partials_of(context) + (row * integer(op, 0) + head) * step, step, size


@inline
def share(op, context, row, head, count, span, tokens, stats, out, d_value):
    """Leave what a span has come to for others; whether all spans of the row are there now."""
    records, step, size = records_of(op, context, row, head, d_value)
    for query in range(count):
        at, numbers = records + query * step + span * size, f32(stats + FLOAT * query)
        f32(at)[0], f32(at)[1] = numbers[LARGEST * QUERIES], numbers[TOTAL * QUERIES]
        for column in range(0, d_value, LANES):
            value = load(out + FLOAT * (d_value * query + column))
            store(at + FLOAT * (LANES + column), value)
    counter, spans = spans_done(context, row * integer(op, 0) + head), (tokens + SPAN - 1) // SPAN
    if atomic_add(counter, 1) < spans - 1:
        return False
    atomic_add(counter, -spans)
    return True


@inline
def collect(op, context, row, head, count, tokens, stats, whole, d_value):
    """Add up the spans of a row, in their order."""
    records, step, size = records_of(op, context, row, head, d_value)
    for span in range((tokens + SPAN - 1) // SPAN):
        for query in range(count):
            at = records + query * step + span * size
            target = whole + FLOAT * d_value * query
            add_span(f32(at)[0], f32(at)[1], at + FLOAT * LANES, stats, query, target, d_value)


def _walk(key_kind, value_kind):
    """A function: one span, for some rows with some queries each."""
    four, two, single = (tile_of(key_kind, value_kind, queries) for queries in (4, 2, 1))

    @inline
    def row_tile(
        op, scores, stats, first, count, q, out, d_key, d_value, keys, values, low, high, after
    ):
        """All queries of a row, four at a time, two and one."""
        query = 0
        while query + 4 <= count:
            four(
                op, scores, stats, first + query, q + FLOAT * d_key * query,
                out + FLOAT * d_value * query, d_key, d_value, keys, values, low, high, after,
            )  # fmt: skip
            query += 4
        if query + 2 <= count:
            two(
                op, scores, stats, first + query, q + FLOAT * d_key * query,
                out + FLOAT * d_value * query, d_key, d_value, keys, values, low, high, after,
            )  # fmt: skip
            query += 2
        if query < count:
            single(
                op, scores, stats, first + query, q + FLOAT * d_key * query,
                out + FLOAT * d_value * query, d_key, d_value, keys, values, low, high, after,
            )  # fmt: skip

    @inline
    def walk(
        op, context, sequence, key_head, tokens, many, count, span, scratch, q, out, d_key, d_value
    ):
        """One span, for `many` rows in `count` places each; the first row reads `tokens`."""
        scores, stats, window = scratch, scratch + FLOAT * SCORES, integer(op, 3)
        for query in range(many * count):
            f32(stats)[LARGEST * QUERIES + query] = -INFINITY
            f32(stats)[TOTAL * QUERIES + query] = ZERO
        clear(out, many * count * d_value)
        for first in range(span * SPAN, min((span + 1) * SPAN, tokens + many - 1), TILE):
            keys = page(op, context, KEYS, sequence, first)
            keys += key_head * TILE * stride(op, KEYS)
            values = page(op, context, VALUES, sequence, first)
            values += key_head * TILE * stride(op, VALUES)
            # The next tile's keys; behind the last one, what does no harm.
            after, following = keys, first + TILE
            if following < min((span + 1) * SPAN, tokens + many - 1):
                after = page(op, context, KEYS, sequence, following)
                after += key_head * TILE * stride(op, KEYS)
            for row in range(many):
                low = max(0, tokens + row - window - first) if window != 0 else 0
                high = min(TILE, tokens + row - first)
                if low < high:
                    row_tile(
                        op, scores, stats, row * count, count, q + FLOAT * d_key * row * count,
                        out + FLOAT * d_value * row * count, d_key, d_value, keys, values, low,
                        high, after,
                    )  # fmt: skip

    return walk


def _take(walk):
    """A function: some rows through some spans."""

    @inline
    def take(op, context, scratch, sequence, row, many, key_head, head, count, first, last):
        """Rows through the spans from `first` on, before `last`; where that is one, and threads
        share the row, who is the last to come adds up all spans."""
        d_key, d_value = whole_vectors(width(op, KEYS)), whole_vectors(width(op, VALUES))
        stats = scratch + FLOAT * SCORES
        q = stats + FLOAT * STATS
        out = q + FLOAT * QUERIES * d_key
        whole, scale = out + FLOAT * QUERIES * d_value, np.float32(number(op, 2))
        tokens = position(context, sequence) + row - first_row(context, sequence) + 1
        places = places_of(count)
        for i in range(many):
            at = q + FLOAT * d_key * places * i
            take_queries(op, context, row + i, head, count, scale, d_key, at)
        begin(stats, whole, many * places, d_value)
        complete = True
        for span in range(first, last):
            walk(
                op, context, sequence, key_head, tokens, many, places, span, scratch, q, out, d_key,
                d_value,
            )  # fmt: skip
            if span_stride(context) != 0:
                complete = share(op, context, row, head, count, span, tokens, stats, out, d_value)
                if complete:
                    collect(op, context, row, head, count, tokens, stats, whole, d_value)
            else:
                for query in range(many * places):
                    at, numbers = FLOAT * d_value * query, f32(stats + FLOAT * query)
                    add_span(
                        numbers[LARGEST * QUERIES], numbers[TOTAL * QUERIES], out + at, stats,
                        query, whole + at, d_value,
                    )  # fmt: skip
        if complete:
            for i in range(many):
                at = whole + FLOAT * d_value * places * i
                finish(op, context, row + i, head, count, stats, i * places, at, d_value)

    return take


def _attention(key_kind, value_kind):
    take = _take(_walk(key_kind, value_kind))

    @kernel(f"attention.{key_kind}_{value_kind}")
    def attention(op, context, thread, threads):
        """A unit: rows, or a span of one, with up to QUERIES of the queries of a key head."""
        key_heads, split = integer(op, 1), span_stride(context) != 0
        group = integer(op, 0) // key_heads
        chunks, many = (
            (group + QUERIES - 1) // QUERIES,
            1 if split else max(1, QUERIES // places_of(group)),
        )
        scratch, passed, sequence = scratch_of(context, thread), 0, 0
        row, end = first_row(context, 0), first_row(context, 1)
        unit = claim(op, context)
        while True:
            while row >= end and sequence < sequences(context):
                sequence += 1
                if sequence < sequences(context):
                    end = first_row(context, sequence + 1)
            if sequence >= sequences(context):
                break
            tokens = position(context, sequence) + row - first_row(context, sequence) + 1
            spans = (tokens + SPAN - 1) // SPAN if split else 1
            index = unit - passed
            if index >= key_heads * chunks * spans:
                passed, row = passed + key_heads * chunks * spans, row + min(many, end - row)
                continue
            span, index = index % spans, index // spans
            key_head, chunk = index // chunks, index % chunks
            head, count = key_head * group + chunk * QUERIES, min(QUERIES, group - chunk * QUERIES)
            first = span if split else 0
            last = span + 1 if split else (tokens + many - 1 + SPAN - 1) // SPAN
            take(
                op, context, scratch, sequence, row, min(many, end - row), key_head, head, count,
                first, last,
            )  # fmt: skip
            unit = claim(op, context)


_PUT = {"f32": put_floats, "f16": put_halves, "q8_0": put_bytes}
for _kind, _put in _PUT.items():
    _store(_kind, _put)
for _key_kind in _PUT:
    for _value_kind in _PUT:
        _attention(_key_kind, _value_kind)
