"""Products of panels with tiles of tokens, one function a format: see `formats/panels.py`.

Columns are walked in order and every block of 32 adds to its lane once, for one token as for eight;
so a row's bits do not depend on how many came with it. Within a block the sums are whole numbers,
and exact.
"""

from __future__ import annotations

import numpy as np

from . import panel_blocks as blocks
from . import panel_sixteens as sixteens
from . import panel_superblocks as superblocks
from .intrinsics import load_first, splat
from .jit import inline
from .tiles import store_tile

ZERO = np.float32(0)


def _stored(product):
    """A format's product as `linear_cpu.py` calls it: 16 rows, their bias, and the store."""

    def tile(tokens):
        sums = product(tokens)

        @inline
        def store(weight, row_bytes, x, step, columns, out, out_step, bias, rows):
            total = sums(weight, x, step, columns)
            addend = load_first(bias, rows) if bias != 0 else splat(ZERO)
            store_tile(total, addend, out, out_step, rows)

        return store

    return tile


_SUMS = {
    "q8_0": blocks.q8_0, "q4_0": blocks.q4_0, "q4_1": blocks.q4_1, "q5_0": blocks.q5_0,
    "q5_1": blocks.q5_1, "iq4_nl": blocks.iq4_nl, "mxfp4": blocks.mxfp4,
    "q4_k": superblocks.q4_k, "q5_k": superblocks.q5_k, "iq4_xs": superblocks.iq4_xs,
    "q2_k": sixteens.q2_k, "q3_k": sixteens.q3_k, "q6_k": sixteens.q6_k,
}  # fmt: skip
PRODUCTS = {name: _stored(sums) for name, sums in _SUMS.items()}
