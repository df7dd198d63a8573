"""What has an instruction of its own in each set: the dot product of bytes, and their look-up.

Both are exact on all of them.
"""

from __future__ import annotations

from llvmlite import ir

from .intrinsics import LANES, call_llvm
from .isa import isa

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_BYTES = 4 * LANES

#: Levels whose product takes weights of 8 bits as signed, so that nothing has to be made up for.
TAKES_SIGNED = isa().name in ("avx2", "neon")


def emit_dot(builder, total, weights, x, level, signed):
    """total + the sums of 4 products of bytes each: 16 int32, 64 bytes, 16 times 4 bytes as int32.

    With `signed`, weights are stored as w + 128; levels of TAKES_SIGNED take that back, on others
    the sum is too large by 128 times the sum of x.
    """
    if level == "avx2":
        return _dot_avx2(builder, total, weights, x, signed)
    if level == "neon":
        return _dot_neon(builder, total, weights, x, signed)
    if level in ("vnni512", "vnni256"):
        return _dot_vnni(builder, total, weights, x, int(level[4:]))
    return _dot_generic(builder, total, weights, x)


def emit_lookup(builder, codes, table, level):
    """64 bytes of a table of 16, by 64 codes below 16."""
    width, name = _lookup_of(builder.module.triple, level)
    bytes_ = _vector(_I8, width)
    values = ir.Constant(bytes_, [ir.Constant(_I8, value) for value in table * (width // 16)])
    parts = []
    for start in range(0, _BYTES, width):
        part = _part(builder, codes, start, width)
        parts.append(call_llvm(builder, name, bytes_, values, part))
    return _join(builder, parts)


def _lookup_of(triple: str, level: str) -> tuple[int, str]:
    """Bytes that one instruction looks up, and its name; the generic levels know one too."""
    if triple.startswith(("aarch64", "arm64")):
        return 16, "llvm.aarch64.neon.tbl1.v16i8"
    if level == "vnni512":
        return 64, "llvm.x86.avx512.pshuf.b.512"
    if level in ("vnni256", "avx2"):
        return 32, "llvm.x86.avx2.pshuf.b"
    return 16, "llvm.x86.ssse3.pshuf.b.128"


def _vector(element: ir.Type, count: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, count)


def _constant(element: ir.Type, value: int, count: int) -> ir.Constant:
    return ir.Constant(_vector(element, count), [value] * count)


def _dot_vnni(builder, total, weights, x, width):
    """vpdpbusd on vectors of `width` bits."""
    lanes = width // 32
    parts = []
    for start in range(0, LANES, lanes):
        part, bytes_ = _part(builder, total, start, lanes), _vector(_I8, 4 * lanes)
        parts.append(
            call_llvm(
                builder,
                f"llvm.x86.avx512.vpdpbusd.{width}",
                part.type,
                part,
                _part(builder, weights, 4 * start, 4 * lanes),
                builder.bitcast(_part(builder, x, start, lanes), bytes_),
            )
        )
    return _join(builder, parts)


def _dot_avx2(builder, total, weights, x, signed):
    """vpmaddubsw: bytes up to 63 fit its 16-bit sums, wider ones are made positive first."""
    parts = []
    ones, bytes_ = _constant(_I16, 1, 16), _vector(_I8, 32)
    for start in (0, 8):
        w = _part(builder, weights, 4 * start, 32)
        v = builder.bitcast(_part(builder, x, start, 8), bytes_)
        if signed:
            w = builder.xor(w, _constant(_I8, -128, 32))
            # The sign moves from w to x, never the other way: |-128| is 128, a fine unsigned byte.
            v = call_llvm(builder, "llvm.x86.avx2.psign.b", bytes_, v, w)
            w = call_llvm(builder, "llvm.abs.v32i8", bytes_, w, ir.IntType(1)(0))
        pairs = call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", _vector(_I16), w, v)
        fours = call_llvm(builder, "llvm.x86.avx2.pmadd.wd", _vector(_I32, 8), pairs, ones)
        parts.append(builder.add(_part(builder, total, start, 8), fours))
    return _join(builder, parts)


def _dot_neon(builder, total, weights, x, signed):
    """sdot: both operands signed."""
    if signed:
        weights = builder.xor(weights, _constant(_I8, -128, _BYTES))
    parts = []
    for start in range(0, LANES, 4):
        part, bytes_ = _part(builder, total, start, 4), _vector(_I8, 16)
        parts.append(
            call_llvm(
                builder,
                "llvm.aarch64.neon.sdot.v4i32.v16i8",
                part.type,
                part,
                _part(builder, weights, 4 * start, 16),
                builder.bitcast(_part(builder, x, start, 4), bytes_),
            )
        )
    return _join(builder, parts)


def _dot_generic(builder, total, weights, x):
    """Products of an unsigned and a signed byte fit 16 bits; their sums of four need 32."""
    wide = _vector(_I16, _BYTES)
    x = builder.bitcast(x, _vector(_I8, _BYTES))
    product = builder.mul(builder.zext(weights, wide), builder.sext(x, wide))
    for i in range(4):
        every = ir.Constant(_vector(_I32), list(range(i, _BYTES, 4)))
        part = builder.shuffle_vector(product, product, every)
        total = builder.add(total, builder.sext(part, _vector(_I32)))
    return total


def _part(builder: ir.IRBuilder, vector: ir.Value, start: int, count: int) -> ir.Value:
    if vector.type.count == count:
        return vector
    lanes = ir.Constant(_vector(_I32, count), list(range(start, start + count)))
    return builder.shuffle_vector(vector, vector, lanes)


def _join(builder: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        lanes = ir.Constant(_vector(_I32, count), list(range(count)))
        parts = [
            builder.shuffle_vector(a, b, lanes)
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]
