"""The op table's layout: what lowering writes and kernels read, all of it int64.

A program is an array of records, one an op. Operands are (base, offset) pairs, never absolute
addresses, and everything that changes from call to call is in the context; so one table serves
every call, every batch and a recorded graph of launches.
"""

# The C name of every compiled kernel, each in an object of its own.
SYMBOL = "keelback_kernel"

# A record. Each operand takes OPERAND_FIELDS numbers: base, byte offset, bytes from row to row, and
# the row's width in floats. Operand 0 is the output.
KERNEL = 0  # address of the kernel
WAIT = 1  # 1: wait for all threads before this op
COUNTER = 2  # which work counter its blocks are claimed from
ROWS = 3  # context field with the number of rows
PANELS = 4  # 1: the op's matrix lies in panels; 0: its rows are as in the file
ALONE = 5  # 1: in a forward of one row the op is the first thread's alone
WAIT_ONE = 6  # as WAIT, in a forward of one row
MATRIX = 7  # slot of the matrix whose rows are all read, or 0
OPERANDS = 8
OPERAND_FIELDS = 4
MAX_OPERANDS = 12
# Attributes: whole numbers as such, others as the bits of a float64.
ATTRIBUTES = OPERANDS + OPERAND_FIELDS * MAX_OPERANDS
MAX_ATTRIBUTES = 11
RECORD = ATTRIBUTES + MAX_ATTRIBUTES

# What a record of packing holds in place of operands; see pack_cpu.py.
PACK_SOURCE = OPERANDS  # address of the matrices, rows one after another
PACK_TARGET = OPERANDS + 1  # address of the panels
PACK_ROWS = OPERANDS + 2  # rows of one matrix
PACK_PANELS_EACH = OPERANDS + 3  # panels of one matrix
PACK_PANELS = OPERANDS + 4  # panels in all
PACK_BLOCKS = OPERANDS + 5  # superblocks of a row

# Bases. From WEIGHTS up each is where a weight lies: in the file, converted, or in panels.
ABSENT, STATE, PAGES, IDS, OUTPUTS, SHARED = -1, -2, -3, -4, -5, -6
ARENA, LOGITS, WEIGHTS = 0, 1, 2

# The per-call context.
OPS = 0  # number of records
TOKENS = 1  # rows T
OUTPUT_COUNT = 2  # rows R whose logits are asked for
SEQUENCES = 3  # sequences n
OFFSETS = 4  # address of n + 1 row numbers: sequence i has rows OFFSETS[i] to OFFSETS[i + 1]
STATES = 5  # address of n addresses of state blocks
POSITIONS = 6  # address of n token counts read before this forward
PAGE_TABLES = 7  # address of n addresses of page tables; a page table holds addresses of pages
PAGE_ROWS = 8  # tokens a page holds
IDS_ADDRESS = 9  # address of T token ids
OUTPUT_ADDRESS = 10  # address of R row numbers
BASES = 11  # address of the base addresses
COUNTERS = 12  # address of every thread's work counters, zero at the start of a call
BARRIER = 13  # address of the arrivals counter, zero at the start of a call
CANCEL = 14  # address of the cancel flag
YIELD = 15  # address of a function that gives up the processor, or 0
DELAY = 16  # 0, or the seed of random pauses before ops and blocks (a test of barriers)
SCRATCH = 17  # address of every thread's own scratch memory, one after another
SCRATCH_BYTES = 18  # bytes each thread has there
PARTIALS = 19  # address of what spans of rows have come to, for threads that share a row
SPAN_STRIDE = 20  # spans that there is room for of every row there; 0: threads share no row
UNITS = 21  # address of counters of spans that are done, zero before and after every op
COUNTERS_STEP = 22  # bytes from one thread's work counters to the next one's
CONTEXT = 32

# The board on which the leader posts what workers walk: a line of the cache for each group.
TURN = 0  # counts up with every table; its low THREAD_BITS say how many threads take part
PROGRAM = 8  # address of the records
CALL = 9  # address of the context
GIVE_UP = 10  # address of a function that gives up the processor, or 0
DONE = 16  # workers that have come to the end of the table
SEATS = 24  # a seat for every thread follows, the first one's unused
SEAT_BYTES = 64
THREAD_BITS = 16

# A seat.
SEEN = 0  # the last turn that the worker has seen
AWAKE = 1  # 1: in native code, watching the board
CALLED = 2  # 1: has to be woken for the turn that was posted
