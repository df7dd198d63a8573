"""Numba kernels of `experts.py`: rows are sorted by the expert they go to, and threads take pieces
of the matrices of those that are chosen; no other weight is read.

Many rows of an expert are put side by side first, and then multiplied as `linear` does it. What a
row comes to does not depend on the others.
"""

from __future__ import annotations

import numpy as np

from . import experts as definitions
from . import panel_products, row_products
from .access import (
    address,
    claim,
    claim_near,
    claim_size,
    in_panels,
    integer,
    number,
    present,
    rows,
    scratch_of,
    stride,
    width,
)
from .choices import choose, copy_wanted, keep_best_groups, sigmoids, softmax
from .columns_cpu import copy
from .formats.panels import PANELS
from .intrinsics import LANES, f32, fma, i32, load, load_first, splat, store_first
from .jit import inline, kernel
from .linear_cpu import MANY, SOME, as_panel, as_stored

OUT = 0
SCORES, BIAS = 1, 2
X, ROUTES, WEIGHT = 1, 2, 3
FLOAT, VECTOR = 4, 4 * LANES
SIGMOID, GATHERED = definitions.SIGMOID, definitions.GATHERED
ZERO = np.float32(0)
memory, route_memory = inline(definitions.memory), inline(definitions.route_memory)
#: So many rows of an expert, and more, are put side by side.
FEW = 3
#: Vectors of a sum that are one claim.
SUMMED = 32


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


@inline
def whole(numbers, index):
    """One of the int32 at an address."""
    return np.int64(i32(numbers)[index])


@inline
def expert_of(op, context, row, rank):
    """The expert of a row's rank; without routes there is one for each."""
    if not present(op, ROUTES):
        return rank
    return np.int64(f32(address(op, context, ROUTES) + row * stride(op, ROUTES))[rank])


@inline
def sort_pairs(op, context, used, experts, ends, chosen, pairs):
    """Sort (row, rank) pairs by expert; pair p is row p // used, rank p % used.

    Writes the pairs, where those of expert e end (ends[e + 1]; they begin at ends[e]), and the
    experts that have any, whose number it returns. It takes microseconds; so every thread does it
    for itself.
    """
    for expert in range(experts + 1):
        i32(ends)[expert] = 0
    for row in range(rows(op, context)):
        for rank in range(used):
            i32(ends)[expert_of(op, context, row, rank) + 1] += 1
    begin, count = 0, 0
    for expert in range(experts):
        length = whole(ends, expert + 1)
        if length > 0:
            i32(chosen)[count] = expert
            count += 1
        i32(ends)[expert + 1] = begin
        begin += length
    for row in range(rows(op, context)):
        for rank in range(used):
            end = ends + FLOAT * (expert_of(op, context, row, rank) + 1)
            i32(pairs)[whole(end, 0)] = row * used + rank
            i32(end)[0] += 1
    return count


def _against_all(product):
    """A function: 16 rows of a matrix against `count` parts side by side, in whole tiles.

    The first tile asks for weights ahead of their use. Up to SOME - 1 parts behind the last are
    multiplied to no purpose, which takes no longer than to multiply the last ones singly.
    """
    some, many = product(SOME), product(MANY)

    @inline
    def all_parts(weight, row_bytes, x, step, columns, out, lanes, count):
        index = 0
        while index < count:
            at, to = x + index * step, out + index * VECTOR
            if index > 0 and index + SOME < count:
                many(weight, row_bytes, at, step, columns, to, VECTOR, 0, lanes)
                index += MANY
            else:
                some(weight, row_bytes, at, step, columns, to, VECTOR, 0, lanes)
                index += SOME

    return all_parts


def _linear(name, product, ready):
    """A kernel: each row's part of x times the matrices of its experts."""
    one, all_parts = product(1), _against_all(product)

    @inline
    def own(op, context, thread):
        """Addresses of what `experts.memory` gives room to."""
        first, part = scratch_of(context, thread), width(op, X) // integer(op, 3)
        count = rows(op, context) * integer(op, 1)
        chosen, pairs, x, products, end = memory(integer(op, 2), count, part)
        return first, first + chosen, first + pairs, first + x, first + products, first + end

    @inline
    def x_of(op, context, pair):
        """Where the part of x lies that a pair is about."""
        used, parts = integer(op, 1), integer(op, 3)
        at = address(op, context, X) + pair // used * stride(op, X)
        return at + FLOAT * (width(op, X) // parts) * (pair % used) if parts > 1 else at

    @inline
    def out_of(op, context, pair):
        used = integer(op, 1)
        at = address(op, context, OUT) + pair // used * stride(op, OUT)
        return at + FLOAT * integer(op, 0) * (pair % used)

    @inline
    def gather(op, context, pairs, count, x, step):
        """Put parts side by side."""
        for index in range(count):
            part = width(op, X) // integer(op, 3)
            copy(x_of(op, context, whole(pairs, index)), x + index * step, part)

    @inline
    def scatter(op, context, pairs, count, products, row, lanes):
        """Put 16 products of every part to where they belong."""
        for index in range(count):
            target = out_of(op, context, whole(pairs, index)) + FLOAT * row
            store_first(target, load(products + VECTOR * index), lanes)

    @inline
    def meet(op, context, thread, weight, pairs, count, row, last):
        """Rows `row` to `last` of a matrix times `count` parts of x."""
        _, _, _, x, products, panel = own(op, context, thread)
        row_bytes, columns = stride(op, WEIGHT), width(op, WEIGHT)
        step = VECTOR * ((width(op, X) // integer(op, 3) + LANES - 1) // LANES)
        if count >= FEW:
            gather(op, context, pairs, count, x, step)
        while row < last:
            lanes = min(LANES, last - row)
            source = ready(op, weight + row * row_bytes, row_bytes, panel, lanes)
            if count >= FEW:
                all_parts(source, row_bytes, x, step, columns, products, lanes, count)
                scatter(op, context, pairs, count, products, row, lanes)
            else:
                for index in range(count):
                    pair = whole(pairs, index)
                    at, to = x_of(op, context, pair), out_of(op, context, pair) + FLOAT * row
                    one(source, row_bytes, at, 0, columns, to, 0, 0, lanes)
            row += LANES

    @kernel(f"expert_linear.{name}")
    def linear(op, context, thread, threads):
        outputs, used, experts = integer(op, 0), integer(op, 1), integer(op, 2)
        ends, chosen, pairs, _, _, _ = own(op, context, thread)
        count = sort_pairs(op, context, used, experts, ends, chosen, pairs)
        # A claim is a piece of one matrix.
        panels = (outputs + LANES - 1) // LANES
        size = min(panels, claim_size(count * panels, threads))
        pieces = (panels + size - 1) // size
        each = LANES * ((panels + pieces - 1) // pieces)
        matrix = (LANES * panels if in_panels(op) else outputs) * stride(op, WEIGHT)
        blocks = count * pieces
        block = claim_near(op, context, thread, threads, blocks)
        while block < blocks:
            expert, row = whole(chosen, block // pieces), block % pieces * each
            weight = address(op, context, WEIGHT) + expert * matrix
            begin, end = whole(ends, expert), whole(ends, expert + 1)
            while begin < end:
                together, at = min(GATHERED, end - begin), pairs + FLOAT * begin
                meet(op, context, thread, weight, at, together, row, min(outputs, row + each))
                begin += together
            block = claim_near(op, context, thread, threads, blocks)


for _name, _product in row_products.PRODUCTS.items():
    _linear(_name, _product, as_stored)
for _panel in PANELS.values():
    _name = _panel.source.name.lower()
    _linear(_name, panel_products.PRODUCTS[_name], as_panel(_name, _panel))


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
