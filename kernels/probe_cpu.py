"""A kernel that reads memory as fast as it comes: what a token's time is held against."""

from __future__ import annotations

import numpy as np

from .intrinsics import LINE, f32, i64, load, splat, sum_lanes
from .jit import kernel

AT_ONCE = 8


@kernel("probe")
def probe(op, context, thread, threads):
    """Sum a thread's share of floats.

    op: address of two numbers, where the floats begin and their bytes, a multiple of AT_ONCE lines
    a thread. context: address of a float32 a thread for the sums, without which nothing is read.
    """
    begin, share = i64(op)[0], i64(op)[1] // threads
    at, end = begin + thread * share, begin + (thread + 1) * share
    zero = np.float32(0)
    a, b, c, d = splat(zero), splat(zero), splat(zero), splat(zero)
    e, f, g, h = splat(zero), splat(zero), splat(zero), splat(zero)
    while at < end:
        a, b = a + load(at), b + load(at + LINE)
        c, d = c + load(at + 2 * LINE), d + load(at + 3 * LINE)
        e, f = e + load(at + 4 * LINE), f + load(at + 5 * LINE)
        g, h = g + load(at + 6 * LINE), h + load(at + 7 * LINE)
        at += AT_ONCE * LINE
    f32(context)[thread] = sum_lanes(((a + b) + (c + d)) + ((e + f) + (g + h)))
