"""What the values of options may be, where click has no type for it."""

from __future__ import annotations

import re
from typing import Any

import click

from ..kernels.errors import InvalidInput

#: A text that may be empty; what else is given on the command line may not.
TEXT = click.types.StringParamType()


class Numbers(click.ParamType):
    """Whole numbers with commas between them, none of them below `lowest`."""

    name = "numbers"

    def __init__(self, lowest: int) -> None:
        self.lowest = lowest

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers of a text."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers", param, ctx)
        if min(numbers) < self.lowest:
            self.fail(f"{min(numbers)} is less than {self.lowest}", param, ctx)
        return numbers


class Setting(click.ParamType):
    """A number of a kind, int or float, that Sampling takes under the name `setting`.

    default: a number beside these that stands for none.
    """

    def __init__(self, setting: str, kind: Any, default: int | None = None) -> None:
        self.setting, self.number, self.default = setting, click.types.convert_type(kind), default
        self.name = self.number.name

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float:
        """The number of a text."""
        from .sampling import RANGES  # which imports NumPy

        number = self.number.convert(value, param, ctx)
        _, low, high = RANGES[self.setting]
        if number != self.default and not low <= number <= high:
            self.fail(f"{number} is out of range; give a number from {low} to {high}", param, ctx)
        return number


class Bias(click.ParamType):
    """`ID+BIAS` or `ID-BIAS`, llama.cpp's spelling."""

    name = "bias"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        """The id and what its logit changes by."""
        try:
            token, bias = re.split("(?=[+-])", value, maxsplit=1)
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not of the form ID+BIAS or ID-BIAS", param, ctx)


class Size(click.ParamType):
    """Bytes, with or without a unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes of a text."""
        from .footprint import parse_size  # which imports the engine

        try:
            return parse_size(value)
        except InvalidInput as error:
            self.fail(str(error), param, ctx)
