"""How well a model foretells a text the further it has read: a curve, on a terminal or as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..kernels.errors import InvalidInput
from ..kernels.files import check_target, replacing
from .perplexity import Estimate, estimate

#: Buckets of a curve, unless there are fewer positions.
BUCKETS = 24
#: Positions of its first bucket, unless there are few: a mean of fewer tokens says nothing.
_FIRST = 32
_BARS = "▁▂▃▄▅▆▇█"
#: A picture's size, the frame inside it, and the colours of its lines.
_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 700, 40, 352
_COLOURS = ("#1f6f8b", "#c8553d")
_STEPS_OF_TEN = (1, 2, 2.5, 5, 10)
_TICKS = 6


@dataclass(frozen=True, slots=True)
class Bucket:
    """Positions `first` to `last`, and what the tokens there came to."""

    first: int
    last: int
    estimate: Estimate

    @property
    def middle(self) -> float:
        """Where a picture has it."""
        return math.sqrt(self.first * self.last)


def curve(positions: np.ndarray, values: np.ndarray, even: bool = False) -> list[Bucket]:
    """Means of values (n,) by position (n,), from 1 up: in buckets that grow, or of even size."""
    low, high = int(positions.min()), int(positions.max()) + 1
    second = low + max(1, min(_FIRST, (high - low) // BUCKETS))
    if even or second >= high:
        edges = np.linspace(low, high, BUCKETS + 1)
    else:
        edges = np.concatenate([[low], np.geomspace(second, high, BUCKETS)])
    edges = np.unique(np.rint(edges).astype(np.int64))
    buckets = []
    for first, end in pairwise(edges):
        inside = values[(positions >= first) & (positions < end)]
        if len(inside):
            buckets.append(Bucket(int(first), int(end) - 1, estimate(inside)))
    return buckets


def sparkline(values: Sequence[float], low: float | None = None) -> str:
    """A letter a value, the higher the larger; `low` is the lowest letter's, else the smallest."""
    points = np.array(values)
    low, high = points.min() if low is None else low, points.max()
    heights = (points - low) / (high - low) * (len(_BARS) - 1) if high > low else 0 * points
    return "".join(_BARS[round(height)] for height in heights)


def check_picture(path: str) -> None:
    """Raise InvalidInput for a picture that cannot be drawn or written."""
    if Path(path).suffix.lower() != ".svg":
        raise InvalidInput(f"{path}: pictures are drawn as SVG; give a name as curve.svg")
    check_target(path)


def draw(path: str, title: str, lines: dict[str, list[Bucket]]) -> None:
    """Write curves as an SVG picture, positions along a logarithmic axis.

    A mean's line goes through a band of two standard errors to either side.
    """
    buckets = [bucket for line in lines.values() for bucket in line]
    scale = _Scale(buckets)
    parts = [*_frame(title, scale)]
    for i, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        upper = [scale.point(b, b.estimate.mean + 2 * b.estimate.error) for b in line]
        lower = [scale.point(b, b.estimate.mean - 2 * b.estimate.error) for b in line]
        middle = [scale.point(b, b.estimate.mean) for b in line]
        band = " ".join(upper + lower[::-1])
        parts.append(f'<polygon points="{band}" fill="{colour}" fill-opacity="0.15"/>')
        parts.append(
            f'<polyline points="{" ".join(middle)}" fill="none" stroke="{colour}" '
            'stroke-width="2"/>'
        )
        parts.append(_text(_RIGHT, _TOP + 16 + 16 * i, "end", name, colour))
    with replacing(path) as partial:
        partial.write_text("\n".join([*parts, "</svg>\n"]), "utf-8")


class _Scale:
    """From positions and means to the picture's points."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        lows = [b.estimate.mean - 2 * b.estimate.error for b in buckets]
        highs = [b.estimate.mean + 2 * b.estimate.error for b in buckets]
        self.first, self.last = min(b.first for b in buckets), max(b.last for b in buckets)
        self.ticks = _ticks(min(lows), max(highs))
        self.low, self.high = self.ticks[0], self.ticks[-1]

    def x(self, position: float) -> float:
        span = math.log(self.last / self.first) or 1
        return _LEFT + (_RIGHT - _LEFT) * math.log(position / self.first) / span

    def y(self, value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (value - self.low) / (self.high - self.low)

    def point(self, bucket: Bucket, value: float) -> str:
        return f"{self.x(bucket.middle):.1f},{self.y(value):.1f}"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from one below `low` to one above `high`."""
    rough = max(high - low, 1e-3) / _TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * size for size in _STEPS_OF_TEN if power * size >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _frame(title: str, scale: _Scale) -> list[str]:
    """The picture's beginning: axes, their numbers and what they are of."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 24, "start", title),
        _text((_LEFT + _RIGHT) / 2, _HEIGHT - 12, "middle", "tokens read before"),
    ]
    for value in scale.ticks:
        y = scale.y(value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 8, y + 4, "end", f"{value:.4g}"))
    for power in range(math.ceil(math.log10(scale.first)), int(math.log10(scale.last)) + 1):
        x = scale.x(10**power)
        parts.append(f'<path d="M{x:.1f} {_TOP}V{_BOTTOM}" stroke="#ddd"/>')
        parts.append(_text(x, _BOTTOM + 18, "middle", f"{10**power:,}"))
    return parts


def _text(x: float, y: float, anchor: str, text: str, colour: str = "#333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
        f"{escape(text)}</text>"
    )
