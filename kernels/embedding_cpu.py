"""Numba kernels of `embedding.py`: one row at a time, widened to float32."""

from __future__ import annotations

from .access import address, claim, in_panels, indices, rows, scratch_of, stride, width
from .columns_cpu import copies, copy
from .formats.panels import PANELS
from .halves import load_first_bf16, load_first_f16
from .intrinsics import LANES, i64
from .jit import inline, kernel
from .pack_cpu import PLACES
from .panel_values import VALUES

OUT, INDEX, WEIGHT = 0, 1, 2
FLOAT = 4


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


def _quantized(name, panel):
    """Rows of a quantized type, in panels or as the file has them."""
    values, elements = VALUES[name]
    place = PLACES[name]
    source_bytes, panel_bytes = panel.source.nbytes, panel.stored.nbytes * LANES

    @inline
    def packed(weight, row_bytes, row, target, columns):
        at = weight + row // LANES * row_bytes * LANES
        for _ in range(columns // elements):
            values(at, row % LANES, target)
            at, target = at + panel_bytes, target + FLOAT * elements

    @inline
    def stored(weight, row_bytes, row, target, columns, scratch):
        at = weight + row * row_bytes
        for _ in range(columns // elements):
            place(at, scratch, 0)
            values(scratch, 0, target)
            at, target = at + source_bytes, target + FLOAT * elements

    @kernel(f"embedding.{name}")
    def embedding(op, context, thread, threads):
        ids, columns, row = i64(indices(op, context, INDEX)), width(op, OUT), claim(op, context)
        weight, scratch = address(op, context, WEIGHT), scratch_of(context, thread)
        while row < rows(op, context):
            target = address(op, context, OUT) + row * stride(op, OUT)
            if in_panels(op):
                packed(weight, stride(op, WEIGHT), ids[row], target, columns)
            else:
                stored(weight, stride(op, WEIGHT), ids[row], target, columns, scratch)
            row = claim(op, context)


_embedding("f32", copy)
_embedding("f16", copies(load_first_f16, 2))
_embedding("bf16", copies(load_first_bf16, 2))
for _panel in PANELS.values():
    _quantized(_panel.source.name.lower(), _panel)


@kernel("select")
def select(op, context, thread, threads):
    out, x, picked = address(op, context, 0), address(op, context, 1), i64(indices(op, context, 2))
    count, columns = rows(op, context), width(op, 0)
    row = claim(op, context)
    while row < count:
        copy(x + picked[row] * stride(op, 1), out + row * stride(op, 0), columns)
        row = claim(op, context)
