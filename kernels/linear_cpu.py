"""Numba kernels of `linear.py`: threads claim weight rows, 16 at a time, which stay in the cache
while all tokens pass over them."""

from __future__ import annotations

import numpy as np

from . import panel_products, row_products
from .access import (
    address,
    claim,
    claim_near,
    in_panels,
    integer,
    pieces_of,
    present,
    rows,
    scratch_of,
    stride,
    width,
)
from .formats.panels import PANELS
from .intrinsics import LANES, f32, i32, store_bytes, sum_lanes
from .jit import inline, kernel
from .linear import BLOCK, RECORD
from .pack_cpu import packer
from .rounding_cpu import round_block

OUT, X, WEIGHT, BIAS = 0, 1, 2, 3
FLOAT = 4
#: Tokens that meet a weight at once.
MANY, SOME = 8, 4


@inline
def as_stored(op, weight, row_bytes, scratch, lanes):
    """Weights that are multiplied where they lie."""
    return weight


def as_panel(name, panel):
    """Weights in panels, or packed into one now, which is then in the cache for all tokens."""
    pack_rows = packer(name, panel)

    @inline
    def ready(op, weight, row_bytes, scratch, lanes):
        if in_panels(op):
            return weight
        pack_rows(weight, row_bytes, scratch, lanes)
        return scratch

    return ready


def against_all(product):
    """A function: 16 rows of a weight, or the last few, against any number of tokens."""
    many, some, one = product(MANY), product(SOME), product(1)

    @inline
    def unit(weight, row_bytes, x, step, columns, out, out_step, bias, lanes, count):
        row = 0
        while row + MANY <= count:
            at, to = x + row * step, out + row * out_step
            many(weight, row_bytes, at, step, columns, to, out_step, bias, lanes)
            row += MANY
        while row + SOME <= count:
            at, to = x + row * step, out + row * out_step
            some(weight, row_bytes, at, step, columns, to, out_step, bias, lanes)
            row += SOME
        while row < count:
            at, to = x + row * step, out + row * out_step
            one(weight, row_bytes, at, step, columns, to, out_step, bias, lanes)
            row += 1

    return unit


def _linear(name, product, ready):
    unit = against_all(product)

    @kernel(f"linear.{name}")
    def linear(op, context, thread, threads):
        out, x, weight = (
            address(op, context, OUT),
            address(op, context, X),
            address(op, context, WEIGHT),
        )
        outputs, columns, count = width(op, OUT), width(op, WEIGHT), rows(op, context)
        bias = address(op, context, BIAS) if present(op, BIAS) else 0
        row_bytes = stride(op, WEIGHT)
        panels, pieces = pieces_of(op, threads)
        block = claim_near(op, context, thread, threads, pieces)
        while block < pieces:
            begin = block * panels * LANES
            for first in range(begin, min(outputs, begin + panels * LANES), LANES):
                lanes, source = min(LANES, outputs - first), weight + first * row_bytes
                source = ready(op, source, row_bytes, scratch_of(context, thread), lanes)
                unit(
                    source, row_bytes, x, stride(op, X), columns, out + FLOAT * first,
                    stride(op, OUT), bias + FLOAT * first if bias != 0 else 0, lanes, count,
                )  # fmt: skip
            block = claim_near(op, context, thread, threads, pieces)


for _name, _product in row_products.PRODUCTS.items():
    _linear(_name, _product, as_stored)
for _panel in PANELS.values():
    _name = _panel.source.name.lower()
    _linear(_name, panel_products.PRODUCTS[_name], as_panel(_name, _panel))


@kernel("quantize")
def quantize(op, context, thread, threads):
    parts = integer(op, 0)
    columns = width(op, 1) // parts
    block = claim(op, context)
    while block < rows(op, context) * parts:
        row, part = block // parts, block % parts
        target = (
            address(op, context, 0) + row * stride(op, 0) + part * FLOAT * (width(op, 0) // parts)
        )
        source = address(op, context, 1) + row * stride(op, 1) + part * FLOAT * columns
        record = target + columns
        for _ in range(columns // BLOCK):
            unit, low, high = round_block(source)
            store_bytes(target, low)
            store_bytes(target + LANES, high)
            low_sum, high_sum = sum_lanes(low), sum_lanes(high)
            f32(record)[0] = unit
            f32(record)[1] = low_sum + high_sum
            i32(record)[2] = np.int32(-32) * np.int32(low_sum)
            i32(record)[3] = np.int32(-32) * np.int32(high_sum)
            source, target, record = source + FLOAT * BLOCK, target + BLOCK, record + RECORD
        block = claim(op, context)
