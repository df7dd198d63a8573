"""Numba kernels of `experts.py`: rows are sorted by the expert they go to, and threads take pieces
of the matrices of those that are chosen; no other weight is read.

Many rows of an expert are put side by side first, and then multiplied as `linear` does it. What a
row comes to does not depend on the others.
"""

from __future__ import annotations

import numpy as np

from . import experts, panel_products, row_products
from .access import (
    address,
    claim,
    claim_size,
    integer,
    number,
    present,
    rows,
    scratch_of,
    stride,
    width,
)
from .elementary import exp, sigmoid
from .formats.panels import PANELS
from .intrinsics import (
    LANES,
    f32,
    fma,
    i32,
    lane_numbers,
    load,
    load_first,
    max_lanes,
    maximum,
    splat,
    store,
    store_first,
    sum_lanes,
    where_equal,
    where_less,
)
from .jit import inline, kernel
from .linear_cpu import MANY, SOME, as_stored, packed

OUT = 0
SCORES, BIAS = 1, 2
X, ROUTES = 1, 2
FLOAT, VECTOR = 4, 4 * LANES
SIGMOID, GATHERED = experts.SIGMOID, experts.GATHERED
ZERO, INFINITE = np.float32(0), np.float32(np.inf)
LOWEST, NEVER = np.float32(np.finfo(np.float32).min), np.float32(-np.inf)
#: So many rows of an expert and more are put side by side.
FEW = 3
#: Vectors of a sum that are one claim.
SUMMED = 32


# ---- routes


@inline
def load_padded(address, lanes):
    """The first `lanes` lanes, the others smaller than anything."""
    return where_less(
        lane_numbers(), splat(np.float32(lanes)), load_first(address, lanes), splat(NEVER)
    )


@inline
def softmax(scores, target, count):
    most, total = splat(NEVER), splat(ZERO)
    for first in range(0, count, LANES):
        most = maximum(most, load_padded(scores + FLOAT * first, min(LANES, count - first)))
    most = splat(max_lanes(most))
    for first in range(0, count, LANES):
        at, lanes = FLOAT * first, min(LANES, count - first)
        store_first(target + at, exp(load_first(scores + at, lanes) - most), lanes)
        total = total + load_first(target + at, lanes)
    total = splat(sum_lanes(total))
    for first in range(0, count, LANES):
        at, lanes = target + FLOAT * first, min(LANES, count - first)
        store_first(at, load_first(at, lanes) / total, lanes)


@inline
def sigmoids(scores, target, count):
    for first in range(0, count, LANES):
        at, lanes = FLOAT * first, min(LANES, count - first)
        store_first(target + at, sigmoid(load_first(scores + at, lanes)), lanes)


@inline
def copy_wanted(source, bias, target, count):
    """What is chosen by, plus a bias, without NaN: a number is found even among those."""
    for first in range(0, count, LANES):
        at, lanes = FLOAT * first, min(LANES, count - first)
        value = load_padded(source + at, lanes)
        if bias != 0:
            value = value + load_first(bias + at, lanes)
        lowest = where_less(lane_numbers(), splat(np.float32(lanes)), splat(LOWEST), splat(NEVER))
        store(target + at, where_less(lowest, value, value, lowest))


@inline
def best_two(values, count):
    """The sum of the two largest."""
    first, second = NEVER, NEVER
    for index in range(count):
        value = f32(values)[index]
        if value > first:
            first, second = value, first
        elif value > second:
            second = value
    return first + second


@inline
def keep_best_groups(wanted, sums, size, groups, kept):
    """Only experts of the `kept` groups whose best two add up to most are still wanted."""
    for group in range(groups):
        f32(sums)[group] = best_two(wanted + FLOAT * size * group, size)
    for group in range(groups):
        own, better = f32(sums)[group], 0
        for other in range(groups):
            value = f32(sums)[other]
            if value > own or (value == own and other < group):
                better += 1
        if better >= kept:
            for index in range(size):
                f32(wanted)[size * group + index] = NEVER


@inline
def best(wanted, count):
    """The number of the largest, the lowest of several; there are whole vectors of them."""
    most, at = load(wanted), lane_numbers()
    for first in range(LANES, count, LANES):
        value = load(wanted + FLOAT * first)
        at = where_less(most, value, lane_numbers() + np.float32(first), at)
        most = where_less(most, value, value, most)
    at = where_equal(most, splat(max_lanes(most)), at, splat(INFINITE))
    return np.int64(-max_lanes(splat(ZERO) - at))


@inline
def choose(wanted, strengths, count, used, out):
    """Write the numbers and strengths of the `used` best; returns the sum of the strengths."""
    total = ZERO
    for rank in range(used):
        expert = best(wanted, count)
        f32(wanted)[expert] = NEVER
        f32(out)[rank], f32(out)[used + rank] = np.float32(expert), f32(strengths)[expert]
        total += f32(strengths)[expert]
    return total


route_memory = inline(experts.route_memory)


@kernel("route")
def route(op, context, thread, threads):
    count, used = width(op, SCORES), integer(op, 0)
    gating, normalise, scale = integer(op, 1), integer(op, 2), np.float32(number(op, 3))
    eps, groups, kept = np.float32(number(op, 4)), integer(op, 5), integer(op, 6)
    bias = address(op, context, BIAS) if present(op, BIAS) else 0
    strengths = scratch_of(context, thread)
    wanted_at, sums_at, _ = route_memory(count, groups)
    wanted, sums = strengths + wanted_at, strengths + sums_at
    row = claim(op, context)
    while row < rows(op, context):
        scores = address(op, context, SCORES) + row * stride(op, SCORES)
        out = address(op, context, OUT) + row * stride(op, OUT)
        if gating == SIGMOID:
            sigmoids(scores, strengths, count)
        else:
            softmax(scores, strengths, count)
        plain = bias == 0 and groups == 1
        copy_wanted(scores if plain else strengths, bias, wanted, count)
        if groups > 1:
            keep_best_groups(wanted, sums, count // groups, groups, kept)
        total = choose(wanted, strengths, count, used, out)
        divisor = total + eps if normalise != 0 else np.float32(1)
        for rank in range(used):
            f32(out)[used + rank] = scale * (f32(out)[used + rank] / divisor)
        row = claim(op, context)


# ---- rows by expert


def _sorter(expert_of):
    """A function that sorts (row, rank) pairs by expert; pair p is row p // used, rank p % used.

    It writes the pairs, where those of expert e end (ends[e + 1]; they begin at ends[e]), and the
    experts that have any, whose number it returns. It takes microseconds; so every thread does it
    for itself.
    """

    @inline
    def sort_rows(op, context, used, experts, ends, chosen, pairs):
        for expert in range(experts + 1):
            i32(ends)[expert] = 0
        for row in range(rows(op, context)):
            for rank in range(used):
                i32(ends)[expert_of(op, context, row, rank) + 1] += 1
        begin, count = 0, 0
        for expert in range(experts):
            length = i32(ends)[expert + 1]
            if length > 0:
                i32(chosen)[count] = expert
                count += 1
            i32(ends)[expert + 1] = begin
            begin += length
        for row in range(rows(op, context)):
            for rank in range(used):
                end = ends + FLOAT * (expert_of(op, context, row, rank) + 1)
                i32(pairs)[i32(end)[0]] = row * used + rank
                i32(end)[0] += 1
        return count

    return sort_rows


@inline
def copy(source, target, count):
    for first in range(0, count, LANES):
        at, lanes = FLOAT * first, min(LANES, count - first)
        store_first(target + at, load_first(source + at, lanes), lanes)


memory = inline(experts.memory)


def _against_all(product):
    """A function: 16 rows of a matrix against `count` parts side by side, in whole tiles.

    The first tile asks for weights ahead of their use; up to SOME - 1 parts behind the last are
    read, and multiplied to no purpose: that takes no longer than to multiply the last ones singly.
    """
    some, many = product(SOME), product(MANY)

    @inline
    def all_rows(weight, row_bytes, x, step, columns, out, lanes, count):
        index = 0
        while index < count:
            at, to = x + index * step, out + index * VECTOR
            if index > 0 and index + SOME < count:
                many(weight, row_bytes, at, step, columns, to, VECTOR, 0, lanes)
                index += MANY
            else:
                some(weight, row_bytes, at, step, columns, to, VECTOR, 0, lanes)
                index += SOME

    return all_rows


def _products(product, ready, panel_rows, weight_slot, expert_of):
    """A function: each row's part of x times the matrices of its experts.

    panel_rows: a matrix's rows are filled up to a multiple of these.
    """
    one, all_rows, sort_rows = product(1), _against_all(product), _sorter(expert_of)

    @inline
    def x_of(op, context, pair, used, parts):
        """Where the part of x lies that a pair is about."""
        part = pair % used if parts > 1 else 0
        at = address(op, context, X) + pair // used * stride(op, X)
        return at + FLOAT * (width(op, X) // parts) * part

    @inline
    def out_of(op, context, pair, used):
        at = address(op, context, OUT) + pair // used * stride(op, OUT)
        return at + FLOAT * (width(op, OUT) // used) * (pair % used)

    @inline
    def gather(op, context, pairs, count, used, parts, x, step):
        for index in range(count):
            pair = np.int64(i32(pairs)[index])
            copy(x_of(op, context, pair, used, parts), x + index * step, width(op, X) // parts)

    @inline
    def singly(op, context, weight, pairs, count, used, parts, out, lanes):
        """16 rows of a matrix times a few parts of x, where those lie."""
        row_bytes, columns = stride(op, weight_slot), width(op, weight_slot)
        for index in range(count):
            pair = np.int64(i32(pairs)[index])
            x, target = x_of(op, context, pair, used, parts), out_of(op, context, pair, used)
            one(weight, row_bytes, x, 0, columns, target + out, 0, 0, lanes)

    @inline
    def together(op, context, weight, pairs, count, used, x, step, products, out, lanes):
        """16 rows of a matrix times parts of x that stand side by side."""
        row_bytes, columns = stride(op, weight_slot), width(op, weight_slot)
        all_rows(weight, row_bytes, x, step, columns, products, lanes, count)
        for index in range(count):
            target = out_of(op, context, np.int64(i32(pairs)[index]), used) + out
            store_first(target, load(products + VECTOR * index), lanes)

    @inline
    def meet(op, context, weight, pairs, count, first, last, used, parts, x, products, panel):
        """Rows `first` to `last` of a matrix times `count` parts of x."""
        step = VECTOR * ((width(op, X) // parts + LANES - 1) // LANES)
        if count >= FEW:
            gather(op, context, pairs, count, used, parts, x, step)
        for row in range(first, last, LANES):
            lanes, row_bytes, out = min(LANES, last - row), stride(op, weight_slot), FLOAT * row
            source = ready(weight + row * row_bytes, row_bytes, panel, lanes)
            if count >= FEW:
                together(
                    op, context, source, pairs, count, used, x, step, products, out, lanes
                )  # fmt: skip
            else:
                singly(op, context, source, pairs, count, used, parts, out, lanes)

    @inline
    def multiply(op, context, thread, threads, outputs, used, experts, parts):
        ends = scratch_of(context, thread)
        places = memory(experts, rows(op, context) * used, width(op, X) // parts)
        chosen, pairs, x, products, panel = (
            ends + places[0], ends + places[1], ends + places[2], ends + places[3],
            ends + places[4],
        )  # fmt: skip
        groups = sort_rows(op, context, used, experts, ends, chosen, pairs)
        panels = (outputs + LANES - 1) // LANES
        size = min(panels, claim_size(groups * panels, threads))
        pieces = (panels + size - 1) // size
        each = LANES * ((panels + pieces - 1) // pieces)
        matrix = (outputs + panel_rows - 1) // panel_rows * panel_rows * stride(op, weight_slot)
        unit = claim(op, context)
        while unit < groups * pieces:
            expert, first = np.int64(i32(chosen)[unit // pieces]), unit % pieces * each
            weight = address(op, context, weight_slot) + expert * matrix
            last, end = min(outputs, first + each), np.int64(i32(ends)[expert + 1])
            begin = np.int64(i32(ends)[expert])
            while begin < end:
                at, count = pairs + FLOAT * begin, min(GATHERED, end - begin)
                meet(
                    op, context, weight, at, count, first, last, used, parts, x, products, panel
                )  # fmt: skip
                begin += count
            unit = claim(op, context)

    return multiply


@inline
def chosen_expert(op, context, row, rank):
    return np.int64(f32(address(op, context, ROUTES) + row * stride(op, ROUTES))[rank])


@inline
def own_expert(op, context, row, rank):
    return rank


def _linears(name, product, ready, panel_rows):
    by_routes = _products(product, ready, panel_rows, 3, chosen_expert)
    by_heads = _products(product, ready, panel_rows, 2, own_expert)

    @kernel(f"expert_linear.{name}")
    def expert_linear(op, context, thread, threads):
        outputs, used, experts, parts = (
            integer(op, 0),
            integer(op, 1),
            integer(op, 2),
            integer(op, 3),
        )
        by_routes(op, context, thread, threads, outputs, used, experts, parts)

    @kernel(f"head_linear.{name}")
    def head_linear(op, context, thread, threads):
        outputs, heads = integer(op, 0), integer(op, 1)
        by_heads(op, context, thread, threads, outputs, heads, heads, heads)


for _name, _product in row_products.PRODUCTS.items():
    _linears(_name, _product, as_stored, 1)
for _panel in PANELS.values():
    _name = _panel.source.name.lower()
    _product = panel_products.PRODUCTS[_name]
    _linears(_name, _product, packed(_name, _panel), 1)
    _linears(f"{_name}_panel", _product, as_stored, LANES)


@kernel("expert_sum")
def expert_sum(op, context, thread, threads):
    used, columns, size = integer(op, 0), width(op, OUT), LANES * SUMMED
    pieces = (columns + size - 1) // size
    block = claim(op, context)
    while block < rows(op, context) * pieces:
        row, begin = block // pieces, block % pieces * size
        x = address(op, context, X) + row * stride(op, X)
        strengths = address(op, context, ROUTES) + row * stride(op, ROUTES) + FLOAT * used
        out = address(op, context, OUT) + row * stride(op, OUT)
        for first in range(begin, min(columns, begin + size), LANES):
            lanes, total = min(LANES, columns - first), splat(ZERO)
            for rank in range(used):
                values = load_first(x + FLOAT * (rank * columns + first), lanes)
                total = fma(values, splat(f32(strengths)[rank]), total)
            store_first(out + FLOAT * first, total, lanes)
        block = claim(op, context)
