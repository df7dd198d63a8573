"""Products of weight rows as GGUF stores them with tiles of tokens, one function a format.

A sum runs over 16 lanes in the order of the row and ends in a fixed tree, for one token as for
eight; so a row's bits do not depend on how many came with it.
"""

from __future__ import annotations

import numpy as np

from .halves import load_bf16, load_f16, load_first_bf16, load_first_f16
from .intrinsics import LANES, f32, load, load_first, prefetch
from .jit import inline
from .tiles import AHEAD, FETCHED, fma_rows, fma_rows_first, store_sums, zeros

FLOAT = 4
ZERO = np.float32(0)


@inline
def _bias(bias, row):
    return f32(bias)[row] if bias != 0 else ZERO


def floats(load_weight, load_first_weight, element_bytes):
    """Rows of F32, F16 or BF16, two at a time, so that activations are loaded once for both."""

    def tile(tokens):
        start = zeros(tokens)

        @inline
        def product(weight, row_bytes, x, step, columns, out, out_step, bias, rows):
            whole = columns // LANES * LANES
            tail = columns - whole
            ahead = max(AHEAD, 2 * row_bytes)
            for row in range(0, rows, 2):
                second = weight + (row_bytes if row + 1 < rows else 0)
                a, b = start(), start()
                for column in range(0, whole, LANES):
                    at = x + FLOAT * column
                    if tokens <= FETCHED:
                        prefetch(weight + ahead + element_bytes * column)
                        prefetch(second + ahead + element_bytes * column)
                    a = fma_rows(a, load_weight(weight + element_bytes * column), at, step)
                    b = fma_rows(b, load_weight(second + element_bytes * column), at, step)
                if tail > 0:
                    at, end = x + FLOAT * whole, element_bytes * whole
                    a = fma_rows_first(a, load_first_weight(weight + end, tail), at, step, tail)
                    b = fma_rows_first(b, load_first_weight(second + end, tail), at, step, tail)
                target = out + FLOAT * row
                store_sums(a, _bias(bias, row), target, out_step)
                if row + 1 < rows:
                    store_sums(b, _bias(bias, row + 1), target + FLOAT, out_step)
                weight += 2 * row_bytes

        return product

    return tile


PRODUCTS = {
    "f32": floats(load, load_first, 4),
    "f16": floats(load_f16, load_first_f16, 2),
    "bf16": floats(load_bf16, load_first_bf16, 2),
}
