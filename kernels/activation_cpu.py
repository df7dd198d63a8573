"""Numba kernels of `activation.py`: blocks of rows, 16 lanes at a time."""

from __future__ import annotations

import numpy as np

from .access import address, claim, number, present, rows, stride, width
from .elementary import sigmoid, silu, softplus
from .intrinsics import LANES, load_first, store_first
from .jit import inline, kernel

OUT, X, Y = 0, 1, 2
ROWS_A_BLOCK = 4
FLOAT = 4


def _unary(name, function):
    @kernel(name)
    def unary(op, context, thread, threads):
        out, x, columns, count = (
            address(op, context, OUT),
            address(op, context, X),
            width(op, OUT),
            rows(op, context),
        )
        scale, biased = np.float32(number(op, 0)), present(op, Y)
        bias = address(op, context, Y) if biased else 0
        block = claim(op, context)
        while block * ROWS_A_BLOCK < count:
            for row in range(block * ROWS_A_BLOCK, min(count, (block + 1) * ROWS_A_BLOCK)):
                source, target = x + row * stride(op, X), out + row * stride(op, OUT)
                for column in range(0, columns, LANES):
                    lanes = min(LANES, columns - column)
                    value = load_first(source + FLOAT * column, lanes)
                    if biased:
                        value = value + load_first(bias + FLOAT * column, lanes)
                    store_first(target + FLOAT * column, function(value) * scale, lanes)
            block = claim(op, context)


def _binary(name, function):
    @kernel(name)
    def binary(op, context, thread, threads):
        out, x, y = address(op, context, OUT), address(op, context, X), address(op, context, Y)
        columns, count, scale = width(op, OUT), rows(op, context), np.float32(number(op, 0))
        block = claim(op, context)
        while block * ROWS_A_BLOCK < count:
            for row in range(block * ROWS_A_BLOCK, min(count, (block + 1) * ROWS_A_BLOCK)):
                left, right, target = (
                    x + row * stride(op, X),
                    y + row * stride(op, Y),
                    out + row * stride(op, OUT),
                )
                for column in range(0, columns, LANES):
                    lanes = min(LANES, columns - column)
                    a = load_first(left + FLOAT * column, lanes)
                    b = load_first(right + FLOAT * column, lanes)
                    store_first(target + FLOAT * column, function(a, b, scale), lanes)
            block = claim(op, context)


@inline
def _scaled(a):
    return a


@inline
def _add(a, b, scale):
    return a + b * scale


@inline
def _swiglu(a, b, scale):
    return silu(a) * b


for _name, _function in (
    ("scaled", _scaled), ("silu", silu), ("sigmoid", sigmoid), ("softplus", softplus),
):  # fmt: skip
    _unary(_name, _function)
for _name, _function in (("add", _add), ("swiglu", _swiglu)):
    _binary(_name, _function)
