"""The walker: every thread goes through the op table and calls the kernels, in one native call.

Workers stay in native code between forwards, for a while: they watch a number on the board that
the leader changes when there is a new table to walk.
"""

from __future__ import annotations

from . import table
from .access import delay, matrix_share
from .intrinsics import fetch, i64
from .jit import inline, kernel
from .processor import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    call_kernel,
    call_void,
    flush_denormals,
    pause,
    restore_denormals,
)

KERNEL, WAIT, RECORD_BYTES = table.KERNEL, table.WAIT, 8 * table.RECORD
ALONE, WAIT_ONE, TOKENS = table.ALONE, table.WAIT_ONE, table.TOKENS
OPS, BARRIER, CANCEL, DELAY = table.OPS, table.BARRIER, table.CANCEL, table.DELAY
YIELD = table.YIELD
TURN, PROGRAM, CALL, DONE = table.TURN, table.PROGRAM, table.CALL, table.DONE
GIVE_UP, SEATS, SEAT_BYTES = table.GIVE_UP, table.SEATS, table.SEAT_BYTES
SEEN, AWAKE, CALLED, THREAD_BITS = table.SEEN, table.AWAKE, table.CALLED, table.THREAD_BITS
MOST_THREADS = (1 << THREAD_BITS) - 1

#: Pauses before a waiting thread gives up the processor: about 20 microseconds.
SPINS = 600
#: Bytes of a matrix that a waiting thread asks for at a time, and how often.
FETCH, FETCHES = 256, 128
#: Turns of an idle worker's wait, most of them giving up the processor: 1 or 2 milliseconds.
PATIENCE = 4000


@inline
def wait_a_little(turns, give_up):
    """Spin at first, then let others have the processor."""
    if turns < SPINS or give_up == 0:
        pause()
    else:
        call_void(give_up)


@inline
def wait_for(context, arrivals, ahead):
    """Wait until `arrivals` threads have come; False when the call was cancelled.

    ahead: what is read next, which comes into the cache meanwhile.
    """
    barrier, cancel, give_up = i64(context)[BARRIER], i64(context)[CANCEL], i64(context)[YIELD]
    turns = 0
    while atomic_load(barrier) < arrivals:
        if ahead != 0 and turns < FETCHES:
            fetch(ahead + turns * FETCH, FETCH)
        if atomic_load(cancel) != 0:
            return False
        turns += 1
        wait_a_little(turns, give_up)
    return atomic_load(cancel) == 0


@inline
def walk(program, context, thread, threads):
    """Call the kernels in turn. Ends early, with all threads, when the call is cancelled.

    In a forward of one row the first thread goes through all that is small alone, without waiting
    for the others from op to op.
    """
    mode = flush_denormals()
    one, waits = i64(context)[TOKENS] == 1, 0
    for index in range(i64(context)[OPS]):
        op = program + index * RECORD_BYTES
        if i64(op)[WAIT_ONE if one else WAIT] != 0:
            waits += 1
            atomic_add(i64(context)[BARRIER], 1)
            ahead = matrix_share(op, context, thread, threads)
            if not wait_for(context, waits * threads, ahead):
                break
        if i64(context)[DELAY] != 0:
            delay(i64(context)[DELAY], index, thread)
        if thread == 0 or not one or i64(op)[ALONE] == 0:
            call_kernel(i64(op)[KERNEL], op, context, thread, threads)
    restore_denormals(mode)


@kernel("post")
def post(board, program, context, threads):
    """Give all workers a table to walk; those asleep are marked as CALLED, and must be woken."""
    i64(board)[PROGRAM], i64(board)[CALL], i64(board)[DONE] = program, context, 0
    turn = (i64(board)[TURN] >> THREAD_BITS) + 1
    atomic_exchange(board + 8 * TURN, turn << THREAD_BITS | threads)
    for worker in range(1, threads):
        seat = board + 8 * SEATS + worker * SEAT_BYTES
        i64(seat)[CALLED] = 1 - atomic_exchange(seat + 8 * AWAKE, 1)


@kernel("lead")
def lead(board, program, context, threads):
    """Walk the table that was posted as the first thread; returns when all have come to its end."""
    walk(program, context, 0, threads)
    turns = 0
    while atomic_load(board + 8 * DONE) < threads - 1:
        turns += 1
        wait_a_little(turns, i64(board)[GIVE_UP])


@kernel("serve")
def serve(board, worker, _a, _b):
    """Walk whatever is posted; returns when there has been nothing to do for a while."""
    seat = board + 8 * SEATS + worker * SEAT_BYTES
    atomic_exchange(seat + 8 * AWAKE, 1)
    turns = 0
    while True:
        turn = atomic_load(board + 8 * TURN)
        if turn != i64(seat)[SEEN]:
            i64(seat)[SEEN], turns = turn, 0
            threads = turn & MOST_THREADS
            # The turn says itself who takes part: what else is on the board changes for others.
            if worker < threads:
                walk(i64(board)[PROGRAM], i64(board)[CALL], worker, threads)
                atomic_add(board + 8 * DONE, 1)
        elif turns < PATIENCE:
            turns += 1
            wait_a_little(turns, i64(board)[GIVE_UP])
        else:
            atomic_exchange(seat + 8 * AWAKE, 0)
            if atomic_load(board + 8 * TURN) == turn:
                break
            # Something came meanwhile; being called for once more than needed does no harm.
            atomic_exchange(seat + 8 * AWAKE, 1)
            turns = 0
