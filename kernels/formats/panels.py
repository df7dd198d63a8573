"""Panels: quantized matrices rearranged so that 16 rows lie in the 16 lanes of a vector.

A panel holds 16 rows. It is walked along the columns, one superblock of the format after another;
inside, the scales of the 16 rows stand together, and every vector of 64 bytes holds 4 consecutive
bytes of each row. So a dot product needs no sum across lanes, and one weight load serves every
token of a tile. Scales of fewer than 8 bits are unpacked to bytes, with what the format subtracts
from them taken off, but for those of Q2_K. Q8_0 is stored with the sign bit flipped (unsigned,
w + 128); codes of tables stay codes.

    format   superblock     scales, 16 rows each                 weights
    Q8_0     32 columns     f16 d                                8 vectors
    Q4_0     32 columns     f16 d                                4 vectors of nibbles
    Q4_1     32 columns     f16 d, f16 m                         4 vectors of nibbles
    Q5_0     32 columns     f16 d                                4 of nibbles, 1 of top bits
    Q5_1     32 columns     f16 d, f16 m                         4 of nibbles, 1 of top bits
    IQ4_NL   32 columns     f16 d                                4 vectors of nibbles
    MXFP4    32 columns     u8 exponent                          4 vectors of nibbles
    Q2_K     256 columns    f16 d, f16 dmin, 16 x two nibbles    8 x 2 vectors of pairs of bits
    Q3_K     256 columns    f16 d, 16 x i8, 32 bytes of nothing  8 x 3 vectors
    Q4_K     256 columns    f16 d, f16 dmin, 8 x (u8, u8)        32 vectors of nibbles
    Q5_K     256 columns    f16 d, f16 dmin, 8 x (u8, u8)        8 x (4 of nibbles, 1 of top bits)
    Q6_K     256 columns    f16 d, 16 x i8, 32 bytes of nothing  16 x 3 vectors
    IQ4_XS   256 columns    f16 d, 8 x i8, 32 bytes of nothing   8 x 4 vectors of nibbles

A group is 4 consecutive columns; a block of 32 columns has 8 of them, and but for Q4_K and Q6_K its
vectors stand together:

    nibbles      vector i has group i in its low nibbles, group 4 + i in its high ones
    top bits     bit i is that of group i
    pairs        vector i has the groups 4 i to 4 i + 3, from the lowest bits on
    3 bits       vector i has group 2 i in the bits 3 to 5 and group 2 i + 1 below them; the top two
                 bits of vector 0 are the upper two of group 6, those of vector 1 the upper two of
                 group 7, and vector 2 has the lowest bits of both

Q4_K is as in the file: of 64 columns, 8 vectors have the first 32 in low nibbles, the others in
high ones. Of 4 blocks of Q6_K, three have a vector each, and the last one's bits stand in the top
two of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .blocks import BY_NAME, BlockFormat

LANES = 16


@dataclass(frozen=True, slots=True)
class Panel:
    """How a format lies in panels: `stored` describes a row's share of a panel as a block."""

    source: BlockFormat
    stored: BlockFormat


def _panel(name: str, nbytes: int) -> Panel:
    source = BY_NAME[name]
    # No file holds such a type: its code is none of GGML's.
    return Panel(source, BlockFormat(f"{name}_PANEL", -source.code - 1, source.elements, nbytes))


#: Bytes that a row's share of a superblock takes.
_SIZES = {
    "Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "IQ4_NL": 18, "MXFP4": 17,
    "Q2_K": 84, "Q3_K": 116, "Q4_K": 148, "Q5_K": 180, "Q6_K": 212, "IQ4_XS": 140,
}  # fmt: skip

PANELS = {panel.source: panel for panel in (_panel(*item) for item in _SIZES.items())}

#: What a row's superblock becomes: (..., bytes) of each part, and the bytes of its units, which
#: stand beside those of the other rows.
Parts = list[tuple[np.ndarray, int]]
_HALF, _BYTE, _GROUP = 2, 1, 4
#: Where the four pairs of bits of a byte begin.
_PAIRS = np.array([0, 2, 4, 6], np.uint8)


def panel_rows(rows: int) -> int:
    """Rows that `rows` rows take in panels: the last panel is filled up with zeros."""
    return -(-rows // LANES) * LANES


def pack(data: np.ndarray, block: BlockFormat, shape: tuple[int, ...]) -> np.ndarray:
    """Rearrange a tensor into panels: the definition of what the kernels `pack.*` do.

    data: uint8, the tensor's bytes. Every matrix of a stack (the last two dimensions of `shape`)
    begins a panel. Returns uint8.
    """
    rows, width = (*(1, 1), *shape)[-2:]
    blocks = data.reshape(-1, rows, width // block.elements, block.nbytes)
    parts = [_in_lanes(part, size) for part, size in _PARTS[block.name](blocks)]
    return np.concatenate(parts, axis=3).reshape(-1)


def _in_lanes(part: np.ndarray, size: int) -> np.ndarray:
    """(stack, rows, superblocks, bytes) -> (stack, panels, superblocks, bytes of 16 rows)."""
    stack, rows, superblocks, nbytes = part.shape
    padded = np.zeros((stack, panel_rows(rows), superblocks, nbytes), np.uint8)
    padded[:, :rows] = part
    units = padded.reshape(stack, -1, LANES, superblocks, nbytes // size, size)
    return units.transpose(0, 1, 3, 4, 2, 5).reshape(stack, -1, superblocks, LANES * nbytes)


# ---- weights


def _flat(groups: np.ndarray) -> np.ndarray:
    """(superblocks, ..., bytes) -> (superblocks, all bytes), behind the stack and the rows."""
    return groups.reshape(*groups.shape[:3], -1)


def _of_nibbles(both: np.ndarray) -> np.ndarray:
    """(..., n) bytes -> (..., 2 n) weights: the low nibbles, then the high ones."""
    return np.concatenate([both & 15, both >> 4], axis=-1)


def _nibbles(weights: np.ndarray) -> np.ndarray:
    """(..., 32) weights below 16 -> (..., 16) bytes."""
    return weights[..., :16] | weights[..., 16:] << 4


def _fives(weights: np.ndarray) -> np.ndarray:
    """(..., 32) weights below 32 -> (..., 20) bytes."""
    groups = (weights >> 4).reshape(*weights.shape[:-1], 8, 4)
    return np.concatenate([_nibbles(weights & 15), _joined(groups, 1)], axis=-1)


def _joined(groups: np.ndarray, bits: int) -> np.ndarray:
    """(..., n, 4) weights of so many bits -> (..., 4) bytes, the first ones lowest."""
    places = np.arange(groups.shape[-2], dtype=np.uint8)[:, None] * np.uint8(bits)
    return np.bitwise_or.reduce(groups << places, axis=-2)


def _threes(weights: np.ndarray) -> np.ndarray:
    """(..., 32) weights below 8 -> (..., 12) bytes."""
    a, b, c, d, e, f, g, h = np.split(weights, 8, axis=-1)
    lowest = (g & 1) << 6 | (h & 1) << 7
    parts = [a << 3 | b | g >> 1 << 6, c << 3 | d | h >> 1 << 6, e << 3 | f | lowest]
    return np.concatenate(parts, axis=-1)


def _twos(weights: np.ndarray) -> np.ndarray:
    """(..., 32) weights below 4 -> (..., 8) bytes."""
    groups = weights.reshape(*weights.shape[:-1], 2, 4, 4)
    return _joined(groups, 2).reshape(*weights.shape[:-1], 8)


def _pairs_of_bits(two: np.ndarray) -> np.ndarray:
    """(..., 64) bytes of Q2_K or Q3_K -> (..., 8, 32) weights below 4."""
    chunks = two.reshape(*two.shape[:-1], 2, 1, 32) >> _PAIRS[:, None] & 3
    return chunks.reshape(*two.shape[:-1], 8, 32)


def _single_bits(bits: np.ndarray) -> np.ndarray:
    """(..., 32) bytes -> (..., 8, 32): bit i of every byte belongs to block i."""
    return bits[..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1


# ---- formats of 32 columns


def _q8_0(blocks: np.ndarray) -> Parts:
    return [(blocks[..., :2], _HALF), (blocks[..., 2:] ^ 0x80, _GROUP)]


def _as_they_are(scales: int, size: int) -> Callable[[np.ndarray], Parts]:
    """Blocks of some bytes of scales and 16 of nibbles."""
    return lambda blocks: [(blocks[..., :scales], size), (blocks[..., scales:], _GROUP)]


def _five_bits(scales: int) -> Callable[[np.ndarray], Parts]:
    def parts(blocks: np.ndarray) -> Parts:
        first, tops, low = np.split(blocks, [scales, scales + 4], axis=-1)
        bits = np.unpackbits(tops, axis=-1, bitorder="little")
        return [(first, _HALF), (_fives(_of_nibbles(low) | bits << 4), _GROUP)]

    return parts


# ---- formats of 256 columns


def _scales_and_mins(packed: np.ndarray) -> np.ndarray:
    """The 12 bytes of Q4_K and Q5_K -> 8 pairs of a scale and a minimum of 6 bits."""
    low, high, mixed = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (mixed & 15) | (low >> 6 << 4)], axis=-1)
    mins = np.concatenate([high & 63, (mixed >> 4) | (high >> 6 << 4)], axis=-1)
    return _flat(np.stack([scales, mins], axis=-1))


def _q4_k(blocks: np.ndarray) -> Parts:
    pairs = _scales_and_mins(blocks[..., 4:16])
    return [(blocks[..., :4], _HALF), (pairs, _BYTE), (blocks[..., 16:], _GROUP)]


def _q5_k(blocks: np.ndarray) -> Parts:
    halves, packed, tops, low = np.split(blocks, [4, 16, 48], axis=-1)
    chunks = low.reshape(*low.shape[:-1], 4, 32)
    nibbles = np.stack([chunks & 15, chunks >> 4], axis=-2).reshape(*low.shape[:-1], 8, 32)
    weights = _fives(nibbles | _single_bits(tops) << 4)
    return [(halves, _HALF), (_scales_and_mins(packed), _BYTE), (_flat(weights), _GROUP)]


def _q6_k(blocks: np.ndarray) -> Parts:
    low, high, scales, d = np.split(blocks, [128, 192, 208], axis=-1)
    low = low.reshape(*low.shape[:-1], 2, 2, 32)
    high = high.reshape(*high.shape[:-1], 2, 32)
    first, third = (low[..., 0, :] & 15) | (high << 4 & 48), (low[..., 0, :] >> 4) | (high & 48)
    second, last = (
        (low[..., 1, :] & 15) | (high << 2 & 48),
        (low[..., 1, :] >> 4) | (high >> 2 & 48),
    )
    joined = [first | last << 6, second | last >> 2 << 6, third | last >> 4 << 6]
    # (..., 2, 3, 32) -> (..., bytes): three vectors stand side by side.
    groups = np.stack(joined, axis=-2).reshape(*first.shape[:-1], 3, 8, 4).swapaxes(-3, -2)
    return [(d, _HALF), (scales, _BYTE), (_nothing(d), _HALF), (_flat(groups), _GROUP)]


def _nothing(d: np.ndarray) -> np.ndarray:
    """What makes the vectors of weights begin at whole ones."""
    return np.zeros_like(d)


def _q3_k(blocks: np.ndarray) -> Parts:
    tops, two, packed, d = np.split(blocks, [32, 96, 108], axis=-1)
    low, pairs = _of_nibbles(packed[..., :8]), packed[..., 8:]
    high = np.concatenate([pairs >> 2 * i & 3 for i in range(4)], axis=-1)
    weights = _threes(_pairs_of_bits(two) | _single_bits(tops) << 2)
    scales = (low | high << 4) - np.uint8(32)
    return [(d, _HALF), (scales, _BYTE), (_nothing(d), _HALF), (_flat(weights), _GROUP)]


def _q2_k(blocks: np.ndarray) -> Parts:
    scales, two, halves = np.split(blocks, [16, 80], axis=-1)
    return [(halves, _HALF), (scales, _BYTE), (_flat(_twos(_pairs_of_bits(two))), _GROUP)]


def _iq4_xs(blocks: np.ndarray) -> Parts:
    d, high, low, codes = np.split(blocks, [2, 4, 8], axis=-1)
    both = np.stack([low & 15, low >> 4], axis=-1)
    pairs = high[..., None] >> _PAIRS & 3
    scales = (_flat(both) | _flat(pairs) << 4) - np.uint8(32)
    return [(d, _HALF), (scales, _BYTE), (_nothing(d), _HALF), (codes, _GROUP)]


_PARTS: dict[str, Callable[[np.ndarray], Parts]] = {
    "Q8_0": _q8_0, "Q4_0": _as_they_are(2, _HALF), "Q4_1": _as_they_are(4, _HALF),
    "Q5_0": _five_bits(2), "Q5_1": _five_bits(4), "IQ4_NL": _as_they_are(2, _HALF),
    "MXFP4": _as_they_are(1, _BYTE), "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k, "IQ4_XS": _iq4_xs,
}  # fmt: skip
