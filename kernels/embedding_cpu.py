"""Numba kernels of `embedding.py`: one row at a time, widened to float32."""

from __future__ import annotations

import numpy as np

from .access import address, claim, indices, rows, stride, width
from .intrinsics import (
    LANES,
    f16_at,
    f32,
    i8,
    i64,
    load_first,
    load_first_bf16,
    load_first_f16,
    store_first,
)  # fmt: skip
from .jit import inline, kernel

OUT, INDEX, WEIGHT = 0, 1, 2
FLOAT = 4
Q8_0_BLOCK, Q8_0_BYTES = 32, 34


def _copy(load_lanes, element_bytes):
    @inline
    def copy(source, target, columns):
        for column in range(0, columns, LANES):
            lanes = min(LANES, columns - column)
            store_first(
                target + FLOAT * column, load_lanes(source + element_bytes * column, lanes), lanes
            )

    return copy


@inline
def _copy_q8_0(source, target, columns):
    for block in range(columns // Q8_0_BLOCK):
        at, values = source + Q8_0_BYTES * block, f32(target + FLOAT * Q8_0_BLOCK * block)
        scale, bytes_ = f16_at(at), i8(at + 2)
        for i in range(Q8_0_BLOCK):
            values[i] = scale * np.float32(bytes_[i])


def _embedding(name, copy):
    @kernel(f"embedding.{name}")
    def embedding(op, context, thread, threads):
        out, weight, ids = (
            address(op, context, OUT),
            address(op, context, WEIGHT),
            i64(indices(op, context, INDEX)),
        )
        count, columns = rows(op, context), width(op, OUT)
        row = claim(op, context)
        while row < count:
            copy(weight + ids[row] * stride(op, WEIGHT), out + row * stride(op, OUT), columns)
            row = claim(op, context)


_copy_f32 = _copy(load_first, 4)
for _name, _function in (
    ("f32", _copy_f32),
    ("f16", _copy(load_first_f16, 2)),
    ("bf16", _copy(load_first_bf16, 2)),
    ("q8_0", _copy_q8_0),
):
    _embedding(_name, _function)


@kernel("select")
def select(op, context, thread, threads):
    out, x, picked = address(op, context, 0), address(op, context, 1), i64(indices(op, context, 2))
    count, columns = rows(op, context), width(op, 0)
    row = claim(op, context)
    while row < count:
        _copy_f32(x + picked[row] * stride(op, 1), out + row * stride(op, 0), columns)
        row = claim(op, context)
