"""Numba kernels of `activation.py`: blocks of rows, 16 lanes at a time."""

from __future__ import annotations

import numpy as np

from .access import address, claim, integer, number, present, rows, stride, width
from .elementary import sigmoid, silu, softplus
from .intrinsics import LANES, f32, load_first, maximum, splat, store_first
from .jit import inline, kernel

OUT, X, Y = 0, 1, 2
RATE, BIAS = 2, 3
ROWS_A_BLOCK = 4
FLOAT = 4
ZERO = np.float32(0)


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


@inline
def _multiply(a, b, scale):
    return a * b


@inline
def _relu_squared(a):
    positive = maximum(a, splat(ZERO))
    return positive * positive


for _name, _function in (
    ("scaled", _scaled), ("silu", silu), ("sigmoid", sigmoid), ("softplus", softplus),
    ("relu_squared", _relu_squared),
):  # fmt: skip
    _unary(_name, _function)
for _name, _function in (("add", _add), ("swiglu", _swiglu), ("multiply", _multiply)):
    _binary(_name, _function)


@kernel("gated")
def gated(op, context, thread, threads):
    gates = width(op, Y)
    columns = width(op, OUT) // gates
    row = claim(op, context)
    while row < rows(op, context):
        source, gate = (
            address(op, context, X) + row * stride(op, X),
            address(op, context, Y) + row * stride(op, Y),
        )
        target = address(op, context, OUT) + row * stride(op, OUT)
        if columns == 1:
            for column in range(0, gates, LANES):
                at, lanes = FLOAT * column, min(LANES, gates - column)
                value = load_first(source + at, lanes) * sigmoid(load_first(gate + at, lanes))
                store_first(target + at, value, lanes)
        else:
            for part in range(gates):
                factor = sigmoid(splat(f32(gate)[part]))
                for column in range(0, columns, LANES):
                    at, lanes = FLOAT * (part * columns + column), min(LANES, columns - column)
                    store_first(target + at, load_first(source + at, lanes) * factor, lanes)
        row = claim(op, context)


@kernel("bounded_decay")
def bounded_decay(op, context, thread, threads):
    bound, heads = np.float32(number(op, 0)), integer(op, 1)
    columns = width(op, OUT) // heads
    rates, bias = address(op, context, RATE), address(op, context, BIAS)
    row = claim(op, context)
    while row < rows(op, context):
        source = address(op, context, X) + row * stride(op, X)
        target = address(op, context, OUT) + row * stride(op, OUT)
        for head in range(heads):
            rate = f32(rates)[head]
            for column in range(0, columns, LANES):
                at, lanes = FLOAT * (head * columns + column), min(LANES, columns - column)
                value = (load_first(source + at, lanes) + load_first(bias + at, lanes)) * rate
                store_first(target + at, sigmoid(value) * -bound, lanes)
        row = claim(op, context)
