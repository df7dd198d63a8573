"""Cases of ops with matrices: every type that kernels compute with, in rows of whole blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases import LENGTHS, SIZES, T, case, normal, routes

from keelback.kernels.formats.blocks import NATIVE
from keelback.kernels.formats.blocks import QUANTIZED as ALL_QUANTIZED

QUANTIZED = sorted(ALL_QUANTIZED, key=lambda block: block.code)
FLOATS = sorted(NATIVE - ALL_QUANTIZED, key=lambda block: block.code)


def _embeddings() -> None:
    for block in (*FLOATS, *QUANTIZED):
        # Rows of a quantized matrix come in whole blocks.
        sizes = SIZES if block in FLOATS else (block.elements, 3 * block.elements)
        for size in sizes:
            ids = np.random.default_rng(size).integers(0, 23, T)
            table = (normal((size, 4), 23, size), block)
            case(
                f"embedding-{block.name}-{size}", "embedding",
                weights={"weight": table}, attributes={"width": size}, ids=ids,
            )  # fmt: skip


def _linears() -> None:
    shapes = {block: tuple(zip(SIZES, reversed(SIZES), strict=True)) for block in FLOATS}
    for block in QUANTIZED:
        blocks = (1, 2, 3, 5, 8, 9, 1, 2) if block.elements == 32 else (1, 2, 1, 3, 1, 2, 1, 1)
        columns = [block.elements * count for count in blocks]
        shapes[block] = tuple(zip(SIZES, columns, strict=True))
    for block, pairs in shapes.items():
        for i, (width, columns) in enumerate(pairs):
            # 1 to 8 rows and more: eight and four at a time, and all that can be left over.
            lengths = [(1,), (1, 1), (2, 1), (4,), (3, 2), (8,), (1, 6), LENGTHS][i]
            weights: dict[str, Any] = {"weight": (normal((width, 6), width, columns), block)}
            if i % 2:
                weights["bias"] = normal((width, 7), width)
            x = normal((columns, 8), sum(lengths), columns)
            case(
                f"linear-{block.name}-{width}x{columns}", "linear",
                rows={"x": x}, weights=weights, attributes={"width": width}, lengths=lengths,
            )  # fmt: skip


def _experts() -> None:
    # More than what is put side by side at once, and some left over.
    lengths = (70, 1, 9)
    shapes = {(5, 2): (17, 33), (3, 3): (257, 3), (65, 8): (8, 65), (1, 1): (1, 31)}
    for block in (*FLOATS, *QUANTIZED):
        for (experts, used), (width, columns) in shapes.items():
            columns = columns if block in FLOATS else 2 * block.elements
            weights = {"weight": (normal((width, 41), experts, width, columns), block)}
            sizes = {"width": width, "used": used, "experts": experts}
            shape = f"{block.name}-{experts}x{width}x{columns}"
            for parts in {1, used}:
                x = normal((width, 42), sum(lengths), parts * columns)
                case(
                    f"expert_linear-{parts}/{used}-{shape}", "expert_linear",
                    rows={"x": x, "routes": routes(width, sum(lengths), experts, used)},
                    weights=weights, attributes=sizes | {"parts": parts}, lengths=lengths,
                )  # fmt: skip
            if experts < 65:
                case(
                    f"expert_linear-heads-{shape}", "expert_linear", lengths=lengths,
                    rows={"x": normal((width, 50), sum(lengths), experts * columns)},
                    attributes=sizes | {"used": experts, "parts": experts}, weights=weights,
                )  # fmt: skip


for _register in (_embeddings, _linears, _experts):
    _register()
