"""The record that kernels `encode.*` read: FIELDS int64."""

SOURCE = 0  # address of the blocks' float32 values, one block after another
TARGET = 1  # address of the bytes
BLOCKS = 2  # blocks in all
BLOCKS_EACH = 3  # blocks of a row
IMPORTANCE = 4  # address of a row of float32 weights, or 0
FIELDS = 5
