"""Files of logits: llama.cpp's bytes, what is read of them again, and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from distances import log_softmax
from keelback.engine.logits_file import Text, reading, writing
from keelback.kernels.errors import InvalidFile


def test_files_have_llamacpps_bytes(tmp_path: Path):
    rows = np.random.default_rng(2).normal(0, 3, (2 * 3, 5)).astype(np.float32)
    rows[1, 2] = -40  # as good as 16 nats below the likeliest
    rows[2] = 1.5
    text = Text(np.arange(16) % 5, 5, 8)
    with writing(tmp_path / "base", text) as writer:
        writer.add(rows[:4])
        writer.add(rows[4:])
    raw = (tmp_path / "base").read_bytes()
    assert raw[:8] == b"_logits_" and struct.unpack("<3i", raw[8:20]) == (8, 5, 2)
    assert struct.unpack("<16i", raw[20:84]) == tuple(np.arange(16) % 5)
    # A scale, the least log-probability, and an even number of values of 16 bits.
    assert len(raw) == 84 + 6 * (8 + 2 * 6) == text.nbytes
    for row, start in zip(rows, range(84, len(raw), 20), strict=True):
        scale, least, *steps = struct.unpack("<2f6H", raw[start : start + 20])
        expected = np.maximum(log_softmax(row), log_softmax(row).max() - 16)
        assert np.abs(np.array(steps[:5]) * scale + least - expected).max() < 16 / 65535
        assert steps[5] == 0
    exact = np.maximum(log_softmax(rows), log_softmax(rows).max(axis=1, keepdims=True) - 16)
    with reading(tmp_path / "base") as file:
        assert file.text.size == 8 and np.array_equal(file.text.ids, text.ids)
        assert np.abs(np.concatenate([file.read(1), file.read(5)]) - exact).max() < 16 / 65535


def test_one_pass_keeps_exactly_what_came(tmp_path: Path):
    rows = np.random.default_rng(3).normal(0, 20, (6, 7)).astype(np.float32)
    text = Text(np.array([0, 3, 1, 6, 2, 0, 5]), 7, None)
    with writing(tmp_path / "base", text) as writer:
        writer.add(rows)
    with reading(tmp_path / "base") as file:
        assert file.text.size is None and file.text.rows == 6
        read = np.concatenate([file.read(2), file.read(4)])
    came = np.arange(6), text.ids[1:]
    assert np.abs(read[came] - log_softmax(rows)[came]).max() < 1e-5


DAMAGE = {
    "no such file": None,
    "another file": lambda raw: b"GGUF" + raw,
    "nothing": lambda raw: b"",
    "a header alone": lambda raw: raw[:20],
    "an end in the ids": lambda raw: raw[:40],
    "an end in the rows": lambda raw: raw[:-1],
    "bytes behind": lambda raw: raw + b"0000",
    "chunks of two": lambda raw: raw[:8] + struct.pack("<3i", 2, 5, 8) + raw[20:84],
    "no chunk": lambda raw: raw[:16] + struct.pack("<i", 0) + raw[20:],
    "chunks without number": lambda raw: raw[:8] + struct.pack("<3i", 1 << 30, 5, 1 << 30),
    "a negative vocabulary": lambda raw: raw[:12] + struct.pack("<i", -5) + raw[16:],
    "ids out of range": lambda raw: raw[:20] + struct.pack("<i", 99) + raw[24:],
}
ROWS = {
    "a NaN": lambda raw: raw[:84] + struct.pack("<f", float("nan")) + raw[88:],
    "a negative scale": lambda raw: raw[:84] + struct.pack("<f", -1) + raw[88:],
    "more than certain": lambda raw: raw[:88] + struct.pack("<f", 5) + raw[92:],
}


@pytest.mark.parametrize("case", DAMAGE | ROWS)
def test_a_damaged_file_gets_a_sentence(tmp_path: Path, case: str):
    path = tmp_path / "base"
    with writing(path, Text(np.arange(16) % 5, 5, 8)) as writer:
        writer.add(np.zeros((6, 5), np.float32))
    damage = (DAMAGE | ROWS)[case]
    raw = path.read_bytes()
    path.unlink() if damage is None else path.write_bytes(damage(raw))
    with pytest.raises(InvalidFile, match="base"), reading(path) as file:
        file.read(6)
