"""Numba kernels of `experts.py`: threads take blocks of the matrices' rows, as they are stored.

Only rows of chosen experts are read. A product is one sum over 16 lanes in the order of the row,
which ends in a fixed tree.
"""

from __future__ import annotations

import numpy as np

from .access import address, claim, integer, rows, stride, width
from .elementary import exp
from .intrinsics import (
    LANES,
    dot_bytes,
    f16_at,
    f32,
    fma,
    load,
    load_bf16,
    load_f16,
    load_first,
    load_first_bf16,
    load_first_f16,
    splat,
    store_first,
    sum_lanes,
)
from .jit import inline, kernel
from .linear import BLOCK, quantized_width

OUT, X, ROUTES, WEIGHT = 0, 1, 2, 3
SCORES = 1
FLOAT = 4
#: Rows of each chosen matrix that a thread takes at a time.
ROWS_A_BLOCK = 8
Q8_0_BYTES = 34
#: Bytes that `quantize` adds for a block; its scale comes first.
RECORD = FLOAT * quantized_width(BLOCK) - BLOCK
ZERO = np.float32(0)


@inline
def is_chosen(route, count, expert):
    """Whether an expert is among the first `count` of a route."""
    found = False
    for rank in range(count):
        found |= np.int64(f32(route)[rank]) == expert
    return found


@inline
def softmax(scores, out, count, largest):
    """out = exp(score - largest) of scores that lie in order of size, over their sum."""
    total = splat(ZERO)
    for rank in range(0, count, LANES):
        at, lanes = FLOAT * rank, min(LANES, count - rank)
        store_first(out + at, exp(load_first(scores + at, lanes) - largest), lanes)
        total = total + load_first(out + at, lanes)
    divisor = splat(sum_lanes(total))
    for rank in range(0, count, LANES):
        at, lanes = out + FLOAT * rank, min(LANES, count - rank)
        store_first(at, load_first(at, lanes) / divisor, lanes)


@kernel("route")
def route(op, context, thread, threads):
    experts, used = width(op, SCORES), integer(op, 0)
    row = claim(op, context)
    while row < rows(op, context):
        scores = f32(address(op, context, SCORES) + row * stride(op, SCORES))
        out = address(op, context, OUT) + row * stride(op, OUT)
        for rank in range(used):
            # A number is found even among NaNs: it will be used as an index.
            best = -1
            for expert in range(experts):
                if (best < 0 or scores[expert] > scores[best]) and not is_chosen(out, rank, expert):
                    best = expert
            f32(out)[rank] = np.float32(best)
            f32(out)[used + rank] = scores[best]
        strengths = out + FLOAT * used
        softmax(strengths, strengths, used, f32(strengths)[0])
        row = claim(op, context)


def _floats(load_weight, load_first_weight, element_bytes):
    @inline
    def dot(weight, x, rank, ranks, columns):
        """A weight row times part `rank` of the `ranks` that a row of x holds."""
        total = splat(ZERO)
        x = x + FLOAT * rank * columns
        whole = columns // LANES * LANES
        for column in range(0, whole, LANES):
            factor = load_weight(weight + element_bytes * column)
            total = fma(factor, load(x + FLOAT * column), total)
        if whole < columns:
            lanes = columns - whole
            factor = load_first_weight(weight + element_bytes * whole, lanes)
            total = fma(factor, load_first(x + FLOAT * whole, lanes), total)
        return sum_lanes(total)

    return dot


@inline
def _q8_0(weight, x, rank, ranks, columns):
    """The same of rounded rows: all bytes of the row come first, then the records of all blocks."""
    total, first = splat(ZERO), rank * columns // BLOCK
    records = x + ranks * columns
    for block in range(columns // BLOCK):
        at = weight + Q8_0_BYTES * block
        scale = f16_at(at) * f32(records + RECORD * (first + block))[0]
        total = fma(dot_bytes(at + 2, x + BLOCK * (first + block)), splat(scale), total)
    return sum_lanes(total)


def _experts(name, dot):
    @kernel(f"expert_linear.{name}")
    def expert_linear(op, context, thread, threads):
        outputs, used, columns = integer(op, 0), integer(op, 1), width(op, WEIGHT)
        block = claim(op, context)
        while block * ROWS_A_BLOCK < outputs:
            for row in range(rows(op, context)):
                x = address(op, context, X) + row * stride(op, X)
                chosen = f32(address(op, context, ROUTES) + row * stride(op, ROUTES))
                out = f32(address(op, context, OUT) + row * stride(op, OUT))
                for rank in range(used):
                    first = np.int64(chosen[rank]) * outputs
                    for i in range(block * ROWS_A_BLOCK, min(outputs, (block + 1) * ROWS_A_BLOCK)):
                        weight = address(op, context, WEIGHT) + (first + i) * stride(op, WEIGHT)
                        out[rank * outputs + i] = dot(weight, x, 0, 1, columns)
            block = claim(op, context)

    @kernel(f"expert_sum.{name}")
    def expert_sum(op, context, thread, threads):
        outputs, used, columns = integer(op, 0), integer(op, 1), width(op, WEIGHT)
        block = claim(op, context)
        while block * ROWS_A_BLOCK < outputs:
            for row in range(rows(op, context)):
                x = address(op, context, X) + row * stride(op, X)
                chosen = f32(address(op, context, ROUTES) + row * stride(op, ROUTES))
                out = f32(address(op, context, OUT) + row * stride(op, OUT))
                for i in range(block * ROWS_A_BLOCK, min(outputs, (block + 1) * ROWS_A_BLOCK)):
                    total = ZERO
                    for rank in range(used):
                        at = (np.int64(chosen[rank]) * outputs + i) * stride(op, WEIGHT)
                        product = dot(address(op, context, WEIGHT) + at, x, rank, used, columns)
                        total += chosen[used + rank] * product
                    out[i] = total
            block = claim(op, context)


for _name, _dot in (
    ("f32", _floats(load, load_first, 4)),
    ("f16", _floats(load_f16, load_first_f16, 2)),
    ("bf16", _floats(load_bf16, load_first_bf16, 2)),
    ("q8_0", _q8_0),
):
    _experts(_name, _dot)
