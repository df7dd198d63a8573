"""What the values of options may be, where click has no type for it."""

from __future__ import annotations

from typing import Any

import click

#: A text that may be empty; what else is given on the command line may not.
TEXT = click.types.StringParamType()


class Numbers(click.ParamType):
    """Whole numbers with commas between them."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers of a text."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers", param, ctx)
