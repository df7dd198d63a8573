"""How a kernel reads its record and its context: addresses, row ranges, and claims of work."""

from __future__ import annotations

from . import table
from .intrinsics import LANES, f64, i64
from .jit import inline
from .processor import atomic_add, atomic_load, pause

OPERANDS, FIELDS = table.OPERANDS, table.OPERAND_FIELDS
ATTRIBUTES, ROWS, COUNTER = table.ATTRIBUTES, table.ROWS, table.COUNTER
PANELS, MATRIX = table.PANELS, table.MATRIX
BASES, STATES, OFFSETS, SEQUENCES = table.BASES, table.STATES, table.OFFSETS, table.SEQUENCES
COUNTERS, POSITIONS, DELAY = table.COUNTERS, table.POSITIONS, table.DELAY
COUNTERS_STEP = table.COUNTERS_STEP
SCRATCH, SCRATCH_BYTES = table.SCRATCH, table.SCRATCH_BYTES
PAGE_TABLES, PAGE_ROWS = table.PAGE_TABLES, table.PAGE_ROWS
PARTIALS, SPAN_STRIDE, UNITS = table.PARTIALS, table.SPAN_STRIDE, table.UNITS
IDS_BASE, IDS_ADDRESS, OUTPUT_ADDRESS = table.IDS, table.IDS_ADDRESS, table.OUTPUT_ADDRESS

#: Pauses of the longest delay.
LONGEST_DELAY = 4096
#: Claims of a thread in an op, where there are units enough for that.
CLAIMS = 6


@inline
def present(op, slot):
    """Whether an optional operand is there."""
    return i64(op)[OPERANDS + FIELDS * slot] >= 0


@inline
def address(op, context, slot):
    """Address of an operand's first row; the slot is present and neither state nor cache."""
    at = OPERANDS + FIELDS * slot
    record = i64(op)
    return i64(i64(context)[BASES])[record[at]] + record[at + 1]


@inline
def indices(op, context, slot):
    """Address of the int64 numbers of an ids or outputs operand."""
    if i64(op)[OPERANDS + FIELDS * slot] == IDS_BASE:
        return i64(context)[IDS_ADDRESS]
    return i64(context)[OUTPUT_ADDRESS]


@inline
def state(op, context, slot, sequence):
    """Address of an operand in the state block of a sequence."""
    return i64(i64(context)[STATES])[sequence] + i64(op)[OPERANDS + FIELDS * slot + 1]


@inline
def page(op, context, slot, sequence, token):
    """Address of a cache operand's row of a token, counted from the sequence's first."""
    pages, page_rows = i64(i64(i64(context)[PAGE_TABLES])[sequence]), i64(context)[PAGE_ROWS]
    offset = i64(op)[OPERANDS + FIELDS * slot + 1]
    return pages[token // page_rows] + offset + token % page_rows * stride(op, slot)


@inline
def stride(op, slot):
    """Bytes from one row of an operand to the next."""
    return i64(op)[OPERANDS + FIELDS * slot + 2]


@inline
def width(op, slot):
    """Floats of an operand's row."""
    return i64(op)[OPERANDS + FIELDS * slot + 3]


@inline
def integer(op, index):
    """An attribute that is a whole number."""
    return i64(op)[ATTRIBUTES + index]


@inline
def number(op, index):
    """An attribute that is a float64."""
    return f64(op)[ATTRIBUTES + index]


@inline
def rows(op, context):
    """Number of rows this op works on."""
    return i64(context)[i64(op)[ROWS]]


@inline
def in_panels(op):
    """Whether the op's matrix lies in panels."""
    return i64(op)[PANELS] != 0


@inline
def sequences(context):
    """Number of sequences in this forward."""
    return i64(context)[SEQUENCES]


@inline
def first_row(context, sequence):
    """First row of a sequence; that of `sequence + 1` is its end."""
    return i64(i64(context)[OFFSETS])[sequence]


@inline
def sequence_of(context, row):
    """The sequence that a row belongs to."""
    sequence = 0
    while first_row(context, sequence + 1) <= row:
        sequence += 1
    return sequence


@inline
def position(context, sequence):
    """Tokens that a sequence had read before this forward."""
    return i64(i64(context)[POSITIONS])[sequence]


@inline
def scratch_of(context, thread):
    """Address of the memory that is a thread's own."""
    return i64(context)[SCRATCH] + thread * i64(context)[SCRATCH_BYTES]


@inline
def span_stride(context):
    """Spans of a row that there is room for, where threads share rows; else 0."""
    return i64(context)[SPAN_STRIDE]


@inline
def partials_of(context):
    """Address of what spans have come to."""
    return i64(context)[PARTIALS]


@inline
def spans_done(context, index):
    """Address of a counter of spans that are done."""
    return i64(context)[UNITS] + 8 * index


@inline
def delay(seed, index, thread):
    """Pause for a pseudo-random time, so that a missing barrier shows."""
    mixed = (seed + index * 7919 + thread * 104729) * 2862933555777941757
    for _ in range((mixed >> 33) & (LONGEST_DELAY - 1)):
        pause()


@inline
def claim_size(units, threads):
    """How many of an op's units are claimed at once, where they lie side by side in memory.

    Long pieces are read from end to end; several claims a thread even out what threads take.
    """
    return max(1, units // (CLAIMS * threads))


@inline
def share(blocks, thread, threads):
    """The first block of a thread's share, which ends where the next one's begins."""
    return blocks * thread // threads


@inline
def pieces_of(op, threads):
    """How the rows of an op's matrix are claimed: panels of a claim, and claims."""
    panels = (width(op, 0) + LANES - 1) // LANES
    size = claim_size(panels, threads)
    return size, (panels + size - 1) // size


@inline
def matrix_share(op, context, thread, threads):
    """Address of the first row that a thread reads of the op's matrix; 0: the op has none."""
    slot = i64(op)[MATRIX]
    if slot == 0:
        return 0
    size, pieces = pieces_of(op, threads)
    first = share(pieces, thread, threads) * size * LANES
    return address(op, context, slot) + first * stride(op, slot)


@inline
def delay_some(op, context, block):
    """A late block is what a missing barrier fails to wait for; one in eight keeps tests fast."""
    if i64(context)[DELAY] != 0 and (block + i64(context)[DELAY]) & 7 == 0:
        delay(i64(context)[DELAY], i64(op)[COUNTER], block)


@inline
def claim(op, context):
    """The next block of this op that no thread has taken yet, from 0 up."""
    block = atomic_add(i64(context)[COUNTERS] + 8 * i64(op)[COUNTER], 1)
    delay_some(op, context, block)
    return block


@inline
def claim_near(op, context, thread, threads, blocks):
    """A block no thread has taken yet, of the thread's own share first; `blocks`: there is none.

    A thread so meets the same parts of a state at every token, and finds them in its own caches.
    One that is done takes from the others. Shares are whole pieces: what is fetched ahead of a
    block's end is the thread's own.
    """
    for turn in range(threads):
        owner = thread + turn if thread + turn < threads else thread + turn - threads
        counter = i64(context)[COUNTERS] + owner * i64(context)[COUNTERS_STEP]
        counter += 8 * i64(op)[COUNTER]
        first, end = share(blocks, owner, threads), share(blocks, owner + 1, threads)
        # Looking first leaves the line where it is.
        if first + atomic_load(counter) < end:
            block = first + atomic_add(counter, 1)
            if block < end:
                delay_some(op, context, block)
                return block
    return blocks
