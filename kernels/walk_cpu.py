"""The walker: every thread goes through the op table and calls the kernels, in one native call."""

from __future__ import annotations

from . import table
from .access import delay
from .intrinsics import i64
from .jit import inline, kernel
from .processor import (
    atomic_add,
    atomic_load,
    call_kernel,
    call_void,
    flush_denormals,
    pause,
    restore_denormals,
)

KERNEL, WAIT, RECORD_BYTES = table.KERNEL, table.WAIT, 8 * table.RECORD
OPS, BARRIER, CANCEL, YIELD, DELAY = (
    table.OPS,
    table.BARRIER,
    table.CANCEL,
    table.YIELD,
    table.DELAY,
)

#: Pauses before a waiting thread gives up the processor: about 20 microseconds.
SPINS = 600


@inline
def wait_for(context, arrivals):
    """Spin, then yield, until `arrivals` threads have come; False when the call was cancelled."""
    barrier, cancel, give_up = i64(context)[BARRIER], i64(context)[CANCEL], i64(context)[YIELD]
    spins = 0
    while atomic_load(barrier) < arrivals:
        if atomic_load(cancel) != 0:
            return False
        spins += 1
        if spins < SPINS or give_up == 0:
            pause()
        else:
            call_void(give_up)
    return atomic_load(cancel) == 0


@kernel("walk")
def walk(program, context, thread, threads):
    """program: address of the records. Ends early, with all threads, when the call is cancelled."""
    mode = flush_denormals()
    waits = 0
    for index in range(i64(context)[OPS]):
        op = program + index * RECORD_BYTES
        if i64(op)[WAIT] != 0:
            waits += 1
            atomic_add(i64(context)[BARRIER], 1)
            if not wait_for(context, waits * threads):
                break
        if i64(context)[DELAY] != 0:
            delay(i64(context)[DELAY], index, thread)
        call_kernel(i64(op)[KERNEL], op, context, thread, threads)
    restore_denormals(mode)
