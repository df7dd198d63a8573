"""Numba kernels of `experts.py`: threads take units of 16 rows of the matrices.

Only rows of chosen experts are read; they are multiplied as `linear` does it with a single token.
"""

from __future__ import annotations

import numpy as np

from . import panel_products, row_products
from .access import address, claim, integer, rows, scratch_of, stride, width
from .elementary import exp
from .formats.panels import PANELS
from .intrinsics import LANES, f32, fma, load, load_first, splat, stack, store_first, sum_lanes
from .jit import inline, kernel
from .linear_cpu import as_stored, packed

OUT, X, ROUTES, WEIGHT = 0, 1, 2, 3
SCORES = 1
FLOAT = 4
ZERO = np.float32(0)

sixteen_floats = stack(LANES)


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


@inline
def add_scaled(values, strength, target, lanes):
    """target += strength * values, of the first `lanes`."""
    total = fma(load(values), splat(strength), load_first(target, lanes))
    store_first(target, total, lanes)


def _experts(name, product, ready, panel_rows):
    """`panel_rows`: a matrix's rows are filled up to a multiple of these."""
    one = product(1)

    @inline
    def unit(op, context, thread, expert, first, lanes, outputs, x, out):
        """out = the rows of an expert's matrix from `first` on, times x."""
        row_bytes = stride(op, WEIGHT)
        row = expert * ((outputs + panel_rows - 1) // panel_rows * panel_rows) + first
        weight = address(op, context, WEIGHT) + row * row_bytes
        weight = ready(weight, row_bytes, scratch_of(context, thread), lanes)
        one(weight, row_bytes, x, 0, width(op, WEIGHT), out, 0, 0, lanes)

    @kernel(f"expert_linear.{name}")
    def expert_linear(op, context, thread, threads):
        outputs, used = integer(op, 0), integer(op, 1)
        first = LANES * claim(op, context)
        while first < outputs:
            lanes = min(LANES, outputs - first)
            for row in range(rows(op, context)):
                x = address(op, context, X) + row * stride(op, X)
                chosen = f32(address(op, context, ROUTES) + row * stride(op, ROUTES))
                out = address(op, context, OUT) + row * stride(op, OUT)
                for rank in range(used):
                    target = out + FLOAT * (rank * outputs + first)
                    unit(
                        op, context, thread, np.int64(chosen[rank]), first, lanes, outputs, x,
                        target,
                    )  # fmt: skip
            first = LANES * claim(op, context)

    @kernel(f"expert_sum.{name}")
    def expert_sum(op, context, thread, threads):
        outputs, used, products = integer(op, 0), integer(op, 1), sixteen_floats()
        part = FLOAT * (width(op, X) // used)
        first = LANES * claim(op, context)
        while first < outputs:
            lanes = min(LANES, outputs - first)
            for row in range(rows(op, context)):
                x = address(op, context, X) + row * stride(op, X)
                chosen = f32(address(op, context, ROUTES) + row * stride(op, ROUTES))
                out = address(op, context, OUT) + row * stride(op, OUT) + FLOAT * first
                store_first(out, splat(ZERO), lanes)
                for rank in range(used):
                    unit(
                        op, context, thread, np.int64(chosen[rank]), first, lanes, outputs,
                        x + rank * part, products,
                    )  # fmt: skip
                    add_scaled(products, chosen[used + rank], out, lanes)
            first = LANES * claim(op, context)


for _name, _product in row_products.PRODUCTS.items():
    _experts(_name, _product, as_stored, 1)
for _panel in PANELS.values():
    _name = _panel.source.name.lower()
    _product = panel_products.PRODUCTS[_name]
    _experts(_name, _product, packed(_name, _panel), 1)
    _experts(f"{_name}_panel", _product, as_stored, LANES)
