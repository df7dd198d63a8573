"""Numba kernels that rearrange a matrix into panels: `formats/panels.py` defines what they do.

They are no ops of a graph, but their records are walked like those of ops; fields of their own
begin where an op has its operands.
"""

from __future__ import annotations

from .access import claim
from .formats.panels import LANES, PANELS
from .intrinsics import i8, i16, i32, i64
from .jit import inline, kernel
from .table import PACK_BLOCKS as BLOCKS
from .table import PACK_PANELS as PANELS_ALL
from .table import PACK_PANELS_EACH as PANELS_EACH
from .table import PACK_ROWS as ROWS
from .table import PACK_SOURCE as SOURCE
from .table import PACK_TARGET as TARGET

# The sign bits of four bytes.
FLIP = 0x80808080 - (1 << 32)
# In each of four bytes: the low nibble, the two bits above it, the top two.
NIBBLES, PAIRS, TOP = 0x0F0F0F0F, 0x30303030, 0xC0C0C0C0 - (1 << 32)


@inline
def _vectors(source, target, count, lane, flip):
    """`count` groups of 4 bytes of one row, to where they stand among those of 16 rows."""
    words, to = i32(source), i32(target)
    for group in range(count):
        to[LANES * group + lane] = words[group] ^ flip


@inline
def q8_0(block, target, lane):
    i16(target)[lane] = i16(block)[0]
    _vectors(block + 2, target + 2 * LANES, 8, lane, FLIP)


@inline
def q4_0(block, target, lane):
    i16(target)[lane] = i16(block)[0]
    _vectors(block + 2, target + 2 * LANES, 4, lane, 0)


@inline
def q4_k(block, target, lane):
    i16(target)[lane], i16(target)[LANES + lane] = i16(block)[0], i16(block)[1]
    packed, scales = i8(block + 4), i8(target + 4 * LANES + lane)
    for i in range(4):
        low, high, mixed = packed[i], packed[4 + i], packed[8 + i]
        scales[2 * i * LANES], scales[(2 * i + 1) * LANES] = low & 63, high & 63
        scales[(2 * i + 8) * LANES] = (mixed & 15) | (low >> 6 & 3) << 4
        scales[(2 * i + 9) * LANES] = (mixed >> 4 & 15) | (high >> 6 & 3) << 4
    _vectors(block + 16, target + 20 * LANES, 32, lane, 0)


@inline
def q6_k(block, target, lane):
    i16(target)[lane] = i16(block + 208)[0]
    scales, to = i8(block + 192), i8(target + 2 * LANES + lane)
    for i in range(16):
        to[LANES * i] = scales[i]
    for group in range(16):
        chunk, column = group // 8, group % 8
        nibbles, pairs = i32(block + 64 * chunk), i32(block + 128 + 32 * chunk)[column]
        low, high = nibbles[column], nibbles[8 + column]
        first, second = low & NIBBLES | pairs << 4 & PAIRS, high & NIBBLES | pairs << 2 & PAIRS
        third, last = low >> 4 & NIBBLES | pairs & PAIRS, high >> 4 & NIBBLES | pairs >> 2 & PAIRS
        # The last one's six bits are the top two of the others.
        vectors = i32(target + (20 + 12 * group) * LANES)
        vectors[lane] = first | last << 6 & TOP
        vectors[LANES + lane] = second | last << 4 & TOP
        vectors[2 * LANES + lane] = third | last << 2 & TOP


#: By format, a function: a row's superblock, that of the panel, and the row's lane.
PLACES = {"q8_0": q8_0, "q4_0": q4_0, "q4_k": q4_k, "q6_k": q6_k}


def packer(name, panel):
    """A function that packs up to 16 rows into a panel."""
    place, source_bytes, panel_bytes = (
        PLACES[name],
        panel.source.nbytes,
        panel.stored.nbytes * LANES,
    )

    @inline
    def pack_rows(source, row_bytes, target, lanes):
        for lane in range(lanes):
            for block in range(row_bytes // source_bytes):
                at = source + lane * row_bytes + block * source_bytes
                place(at, target + block * panel_bytes, lane)

    return pack_rows


def _pack(name, panel):
    pack_rows = packer(name, panel)
    source_bytes, stored_bytes = panel.source.nbytes, panel.stored.nbytes

    @kernel(f"pack.{name}")
    def pack(op, context, thread, threads):
        record = i64(op)
        rows, each, blocks = record[ROWS], record[PANELS_EACH], record[BLOCKS]
        row_bytes = blocks * source_bytes
        index = claim(op, context)
        while index < record[PANELS_ALL]:
            matrix, first = index // each, index % each * LANES
            source = record[SOURCE] + (matrix * rows + first) * row_bytes
            target = record[TARGET] + index * blocks * stored_bytes * LANES
            pack_rows(source, row_bytes, target, min(LANES, rows - first))
            index = claim(op, context)


for _source, _panel in PANELS.items():
    _pack(_source.name.lower(), _panel)
