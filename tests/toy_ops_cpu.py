"""A kernel that holds a forward up."""

from __future__ import annotations

from keelback.kernels import table
from keelback.kernels.access import integer
from keelback.kernels.intrinsics import i64
from keelback.kernels.jit import kernel
from keelback.kernels.processor import atomic_load, call_kernel, pause

CANCEL = table.CANCEL
#: Attributes of `toy_hold`: the kernel it stands in for, and where the flag lies that releases it.
REPLACED, RELEASE = table.MAX_ATTRIBUTES - 1, table.MAX_ATTRIBUTES - 2
#: A forgotten hold ends by itself after some seconds.
LONGEST_HOLD = 100_000_000


@kernel("toy_hold")
def hold(op, context, thread, threads):
    """Keep this thread until the call is cancelled or released; then run the kernel it replaced."""
    cancel, release = i64(context)[CANCEL], integer(op, RELEASE)
    spins = 0
    while atomic_load(cancel) == 0 and atomic_load(release) == 0 and spins < LONGEST_HOLD:
        spins += 1
        pause()
    if atomic_load(cancel) == 0:
        call_kernel(integer(op, REPLACED), op, context, thread, threads)
