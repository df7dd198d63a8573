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

VECTOR = 4 * LANES
# The sign bits of four bytes.
FLIP = 0x80808080 - (1 << 32)
# In each of four bytes: the low nibble, the two bits above it, the top two; the lowest two, one.
NIBBLES, PAIRS, TOP = 0x0F0F0F0F, 0x30303030, 0xC0C0C0C0 - (1 << 32)
TWO, ONE = 0x03030303, 0x01010101


@inline
def _vectors(source, target, count, lane, flip):
    """`count` groups of 4 bytes of one row, to where they stand among those of 16 rows."""
    words, to = i32(source), i32(target)
    for group in range(count):
        to[LANES * group + lane] = words[group] ^ flip


@inline
def _halves(source, target, count, lane):
    """`count` scales of one row."""
    for i in range(count):
        i16(target)[LANES * i + lane] = i16(source)[i]


@inline
def _bytes(source, target, count, lane):
    """`count` bytes of scales of one row."""
    for i in range(count):
        i8(target)[LANES * i + lane] = i8(source)[i]


# ---- formats of 32 columns


@inline
def q8_0(block, target, lane):
    _halves(block, target, 1, lane)
    _vectors(block + 2, target + 2 * LANES, 8, lane, FLIP)


@inline
def one_scale(block, target, lane):
    _halves(block, target, 1, lane)
    _vectors(block + 2, target + 2 * LANES, 4, lane, 0)


@inline
def q4_1(block, target, lane):
    _halves(block, target, 2, lane)
    _vectors(block + 4, target + 4 * LANES, 4, lane, 0)


@inline
def mxfp4(block, target, lane):
    _bytes(block, target, 1, lane)
    _vectors(block + 1, target + LANES, 4, lane, 0)


def five_bits(halves):
    """Q5_0 and Q5_1: behind the scales 32 top bits, one after another, and 16 bytes of nibbles."""

    @inline
    def place(block, target, lane):
        _halves(block, target, halves, lane)
        source, weights = block + 2 * halves, target + 2 * halves * LANES
        bits, tops = i32(source)[0], 0
        for group in range(8):
            # The product has four bits where the lowest ones of four bytes are, and others.
            tops |= ((bits >> 4 * group & 15) * 0x00204081 & ONE) << group
        _vectors(source + 4, weights, 4, lane, 0)
        i32(weights)[4 * LANES + lane] = tops

    return place


# ---- formats of 256 columns


@inline
def _scales_and_mins(block, target, lane):
    """Q4_K and Q5_K begin alike: d, dmin, 8 scales and 8 minima of 6 bits."""
    _halves(block, target, 2, lane)
    packed, scales = i8(block + 4), i8(target + 4 * LANES + lane)
    for i in range(4):
        low, high, mixed = packed[i], packed[4 + i], packed[8 + i]
        scales[2 * i * LANES], scales[(2 * i + 1) * LANES] = low & 63, high & 63
        scales[(2 * i + 8) * LANES] = (mixed & 15) | (low >> 6 & 3) << 4
        scales[(2 * i + 9) * LANES] = (mixed >> 4 & 15) | (high >> 6 & 3) << 4


@inline
def q4_k(block, target, lane):
    _scales_and_mins(block, target, lane)
    _vectors(block + 16, target + 20 * LANES, 32, lane, 0)


@inline
def q5_k(block, target, lane):
    _scales_and_mins(block, target, lane)
    for part in range(8):
        down, tops = part % 2 * 4, 0
        nibbles, bits = i32(block + 48 + part // 2 * 32), i32(block + 16)
        vectors = i32(target + 20 * LANES + 5 * VECTOR * part)
        for i in range(4):
            low, high = nibbles[i] >> down & NIBBLES, nibbles[4 + i] >> down & NIBBLES
            vectors[LANES * i + lane] = low | high << 4
            tops |= (bits[i] >> part & ONE) << i | (bits[4 + i] >> part & ONE) << 4 + i
        vectors[4 * LANES + lane] = tops


@inline
def q6_k(block, target, lane):
    _halves(block + 208, target, 1, lane)
    _bytes(block + 192, target + 2 * LANES, 16, lane)
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


@inline
def _three_bits(block, part, group):
    """Four weights of Q3_K: two bits of each, and one from elsewhere."""
    two = i32(block + 32 + part // 4 * 32)[group] >> part % 4 * 2 & TWO
    return two | (i32(block)[group] >> part & ONE) << 2


@inline
def q3_k(block, target, lane):
    _halves(block + 108, target, 1, lane)
    packed, scales = i8(block + 96), i8(target + 2 * LANES + lane)
    for i in range(16):
        low, high = packed[i % 8] >> i // 8 * 4 & 15, packed[8 + i % 4] >> i // 4 * 2 & 3
        scales[LANES * i] = (low | high << 4) - 32
    for part in range(8):
        g, h = _three_bits(block, part, 6), _three_bits(block, part, 7)
        vectors = i32(target + 20 * LANES + 3 * VECTOR * part)
        for i in range(3):
            high, low = _three_bits(block, part, 2 * i), _three_bits(block, part, 2 * i + 1)
            # The last two groups fill the top bits.
            rest = g >> 1 if i == 0 else h >> 1 if i == 1 else (g & ONE) | (h & ONE) << 1
            vectors[LANES * i + lane] = high << 3 | low | (rest & TWO) << 6


@inline
def q2_k(block, target, lane):
    _halves(block + 80, target, 2, lane)
    _bytes(block, target + 4 * LANES, 16, lane)
    for part in range(8):
        two, down = i32(block + 16 + part // 4 * 32), part % 4 * 2
        vectors = i32(target + 20 * LANES + 2 * VECTOR * part)
        for half in range(2):
            joined = 0
            for i in range(4):
                joined |= (two[4 * half + i] >> down & TWO) << 2 * i
            vectors[LANES * half + lane] = joined


@inline
def iq4_xs(block, target, lane):
    _halves(block, target, 1, lane)
    high, low, scales = i16(block)[1], i8(block + 4), i8(target + 2 * LANES + lane)
    for i in range(8):
        scales[LANES * i] = (low[i // 2] >> i % 2 * 4 & 15 | (high >> 2 * i & 3) << 4) - 32
    _vectors(block + 8, target + 12 * LANES, 32, lane, 0)


#: By format, a function: a row's superblock, that of the panel, and the row's lane.
PLACES = {
    "q8_0": q8_0, "q4_0": one_scale, "q4_1": q4_1, "q5_0": five_bits(1), "q5_1": five_bits(2),
    "iq4_nl": one_scale, "mxfp4": mxfp4, "q2_k": q2_k, "q3_k": q3_k, "q4_k": q4_k, "q5_k": q5_k,
    "q6_k": q6_k, "iq4_xs": iq4_xs,
}  # fmt: skip


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
