"""Panels: quantized matrices rearranged so that 16 rows lie in the 16 lanes of a vector.

A panel holds 16 rows. It is walked along the columns, one superblock of the format after another;
inside, the scales of the 16 rows stand together, and every vector of 64 bytes holds 4 consecutive
bytes of each row. So a dot product needs no sum across lanes, and one weight load serves every
token of a tile. What a byte means is left as GGUF has it, but for Q8_0, stored with the sign bit
flipped (unsigned, w + 128), for the 6-bit scales of Q4_K, unpacked to bytes, and for the weights of
Q6_K, whose six bits are joined: of 4 blocks of 32 columns, three have a vector each, and the last
one's bits stand in the top two of theirs.

    format  superblock     scales, 16 rows each                 weights
    Q8_0    32 columns     f16 d                                8 vectors
    Q4_0    32 columns     f16 d                                4 vectors, two nibbles a byte
    Q4_K    256 columns    f16 d, f16 dmin, 8 x (u8, u8)        32 vectors, two nibbles a byte
    Q6_K    256 columns    f16 d, 16 x i8, 32 bytes of nothing  16 x 3 vectors
"""

from __future__ import annotations

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


PANELS = {
    panel.source: panel
    for panel in (_panel("Q8_0", 34), _panel("Q4_0", 18), _panel("Q4_K", 148), _panel("Q6_K", 212))
}


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
    padded = np.zeros((len(blocks), panel_rows(rows), *blocks.shape[2:]), np.uint8)
    padded[:, :rows] = blocks
    if block.name == "Q8_0":
        padded[:, :rows, :, 2:] ^= 0x80
    # (stack, panel, lane, superblock, byte) -> (stack, panel, superblock, lane, byte)
    lanes = padded.reshape(len(blocks), -1, LANES, *blocks.shape[2:]).swapaxes(2, 3)
    parts = _PARTS[block.name](lanes)
    return np.concatenate([part.reshape(*part.shape[:3], -1) for part in parts], axis=3).reshape(-1)


def _scales(part: np.ndarray, nbytes: int) -> np.ndarray:
    """(..., lane, bytes) -> (..., scale, lane, `nbytes`)."""
    return part.reshape(*part.shape[:-1], -1, nbytes).swapaxes(-3, -2)


def _vectors(part: np.ndarray) -> np.ndarray:
    """Columns of 4 bytes, 16 rows each."""
    return _scales(part, 4)


def _one_scale(lanes: np.ndarray) -> list[np.ndarray]:
    return [_scales(lanes[..., :2], 2), _vectors(lanes[..., 2:])]


def _q4_k(lanes: np.ndarray) -> list[np.ndarray]:
    packed = lanes[..., 4:16]
    low, high, mixed = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (mixed & 15) | (low >> 6 << 4)], axis=-1)
    mins = np.concatenate([high & 63, (mixed >> 4) | (high >> 6 << 4)], axis=-1)
    pairs = np.stack([scales, mins], axis=-1).reshape(*scales.shape[:-1], 16)
    return [_scales(lanes[..., :4], 2), _scales(pairs, 1), _vectors(lanes[..., 16:])]


def _q6_k(lanes: np.ndarray) -> list[np.ndarray]:
    low, high, scales, d = np.split(lanes, [128, 192, 208], axis=-1)
    low = low.reshape(*low.shape[:-1], 2, 2, 32)
    high = high.reshape(*high.shape[:-1], 2, 32)
    first, third = (low[..., 0, :] & 15) | (high << 4 & 48), (low[..., 0, :] >> 4) | (high & 48)
    second, last = (
        (low[..., 1, :] & 15) | (high << 2 & 48),
        (low[..., 1, :] >> 4) | (high >> 2 & 48),
    )
    joined = [first | last << 6, second | last >> 2 << 6, third | last >> 4 << 6]
    # (..., lane, 2, 3, 32) -> (..., lane, bytes): three vectors stand side by side.
    groups = np.stack(joined, axis=-2).reshape(*first.shape[:-1], 3, 8, 4).swapaxes(-3, -2)
    fill = np.zeros((*d.shape[:-2], 2 * LANES), np.uint8)
    weights = _vectors(groups.reshape(*d.shape[:-1], -1))
    return [_scales(d, 2), _scales(scales, 1), fill, weights]


_PARTS = {"Q8_0": _one_scale, "Q4_0": _one_scale, "Q4_K": _q4_k, "Q6_K": _q6_k}
