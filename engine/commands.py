"""How commands end: errors that a user can mend are one sentence, and Ctrl-C has a status."""

from __future__ import annotations

import errno
import re
import sys
import warnings
from typing import Any

import click

from ..kernels.errors import KeelbackError
from .faults import explain_bus_errors
from .option_types import TEXT
from .wording import notice, version

#: The exit status after Ctrl-C.
INTERRUPTED = 130


def show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the version, and end the program, where the option for it was given."""
    if wanted:
        click.echo(f"keelback, version {version()}")
        ctx.exit()


class Command(click.Command):
    """A command that takes no empty value for one that was not given, and no `-ngl` for `-n gl`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """What click makes of the arguments; raises UsageError for what nobody can have meant."""
        if not ctx.ignore_unknown_options:
            self._check_names(ctx, args)
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            given = ctx.params.get(parameter.name or "")
            values = given if isinstance(given, tuple) else (given,)
            if "" in values and parameter.type is not TEXT:
                raise click.BadParameter("it is empty; fill it in or leave it out", ctx, parameter)
        return rest

    def _check_names(self, ctx: click.Context, args: list[str]) -> None:
        """Refuse options of one dash and several letters that click would cut into short ones."""
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        known = {name for option in options for name in option.opts}
        flags = {name for option in options if option.is_flag for name in option.opts}
        rest = iter(args)
        for arg in rest:
            name = arg.partition("=")[0]
            if arg == "--":
                return
            if arg in known - flags:
                next(rest, None)  # its value
            elif name not in known and re.match("-[a-zA-Z]{2}", name):
                raise click.NoSuchOption(name, ctx=ctx)


class Commands(click.Group):
    """A group whose commands turn errors that a user can mend into one sentence and status 1."""

    command_class, group_class = Command, type

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        explain_bus_errors()
        warnings.showwarning = lambda message, *_: notice(str(message))
        try:
            return super().invoke(ctx)
        except KeelbackError as error:
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            what = error.filename or "the output cannot be written"
            raise click.ClickException(f"{what}: {error.strerror}") from None
        except MemoryError:
            raise click.ClickException("there is not enough memory for this model") from None
