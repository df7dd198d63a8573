"""The commands of `keelback gguf`: a few lines each. What they do, engine and convert do."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import click

from .engine.printing import bar, bars, size


@click.group("gguf")
def gguf() -> None:
    """Look into GGUF files, change their keys, split, merge and check them."""


@gguf.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--no-tensors", "tensors", flag_value=False, default=True, help="Show keys only.")
@click.option("--full", is_flag=True, help="Show long texts and arrays to their end.")
def dump(file: str, as_json: bool, tensors: bool, full: bool) -> None:
    """Show all keys with their types and values, and where each tensor lies."""
    from .engine import dump as dumping

    if as_json:
        click.echo(json.dumps(dumping.dump(file, full, tensors), indent=2))
        return
    for line in dumping.dump_lines(file, full, tensors):
        click.echo(line)


@gguf.command("set", context_settings={"ignore_unknown_options": True})  # values below zero
@click.argument("file")
@click.argument("key")
@click.argument("value", required=False)
@click.option("--type", "kind", metavar="TYPE", help="u8, i8 ... f64, bool, str, or arr[str] ...")
@click.option("--remove", is_flag=True, help="Take the key away.")
@click.option("--out", "target", metavar="OUT", help="Write another file, and leave FILE.")
@click.option("--force", is_flag=True, help="Also keys that say how the tensors are to be read.")
def set_command(file: str, key: str, value: str | None, remove: bool, **options: Any) -> None:
    """Give KEY of FILE a VALUE; arrays are JSON lists. A key that is there keeps its type."""
    from .convert.edit import set_pair

    if remove == (value is not None):
        raise click.UsageError("give either a VALUE or --remove")
    with bar("writing") as report:
        path = set_pair(file, key, value, **options, progress=report)
    click.echo(path)


@gguf.command()
@click.argument("file")
@click.argument("prefix", metavar="OUT-PREFIX")
@click.option("--split-max-size", "max_size", metavar="N(M|G)", help="Largest size of a part.")
@click.option("--split-max-tensors", "max_tensors", type=int, help="Tensors of a part. [128]")
def split(file: str, prefix: str, max_size: str | None, max_tensors: int | None) -> None:
    """Split a model into OUT-PREFIX-00001-of-00003.gguf and so on, as llama.cpp does."""
    from .convert import edit

    with bar("splitting") as report:
        paths = edit.split(file, prefix, max_size, max_tensors, report)
    for path in paths:
        click.echo(f"{path}: {size(path.stat().st_size)}")


@gguf.command()
@click.argument("first", metavar="FIRST-PART")
@click.argument("out")
def merge(first: str, out: str) -> None:
    """Merge the parts of a model, given as the first, into one file."""
    from .convert import edit

    with bar("merging") as report:
        path = edit.merge(first, out, report)
    click.echo(f"{path}: {size(path.stat().st_size)}")


@gguf.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(files: tuple[str, ...], as_json: bool) -> None:
    """Read files to their end: NaN, infinities, sizes, and whether they can be run.

    The status is 1 when something is wrong with one of them.
    """
    from .engine import check as checking

    with bars() as report:
        found = [checking.check(file, partial(report, file)) for file in files]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    for facts in [] if as_json else found:
        ok = f"{facts['file']}: ok, {facts['tensors']} tensors, {size(facts['bytes'])}"
        click.echo("\n".join(facts["problems"]) or ok)
    sys.exit(any(facts["problems"] for facts in found))
