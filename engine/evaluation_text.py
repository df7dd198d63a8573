"""What `perplexity`, `imatrix` and `drift` found, as lines on a terminal."""

from __future__ import annotations

from typing import Any

import click

from ..kernels.errors import printable
from .curve import sparkline
from .wording import size

_WIDTH = 26


def running_list(number: int, ppl: float) -> None:
    """Print a chunk of llama.cpp's running list."""
    click.echo(f"[{number}]{ppl:.4f},", nl=False)


def found_lines(facts: dict[str, Any]) -> list[str]:
    """The figures of a measurement, the most wanted first."""
    size, scored = facts["ctx_size"], facts["scored"]
    way = (
        f"in the second halves of chunks of {size}"
        if size
        else "in one pass, the state carried from first to last"
    )
    cut = ", interrupted" if facts["interrupted"] else ""
    lines = [
        *([""] if facts["chunks"] else []),  # the end of the running list
        f"{printable(facts['model'])}: {scored} tokens {way}{cut}",
        f"PPL = {facts['ppl']:.4f} +/- {facts['ppl_error']:.5f}  "
        f"({facts['nll']:.5f} ± {facts['nll_error']:.5f} nats a token)",
        *([] if facts["divergence"] is None else _divergence_lines(facts["divergence"])),
        _curve_line(facts["curve"]),
    ]
    return lines


def _curve_line(points: list[dict[str, Any]]) -> str:
    line, first, last = sparkline([point["nll"] for point in points]), points[0], points[-1]
    return (
        f"nats by position: {first['nll']:.2f} {line} {last['nll']:.2f}  "
        f"({first['first']} to {last['last']}; the last from {last['first']} on)"
    )


def _divergence_lines(found: dict[str, Any]) -> list[str]:
    kl, shift, same, paired = found["kl"], found["delta_p"], found["same_top"], found["paired"]
    rows = {
        "PPL of the base": f"{found['base_ppl']:.4f} ± {found['base_ppl_error']:.4f}",
        "PPL ratio": f"{found['ppl_ratio']:.6f} ± {found['ppl_ratio_error']:.6f}",
        "nats more than the base": f"{found['nll_difference']:.6f} ± "
        f"{found['nll_difference_error']:.6f}; from {paired['blocks']} blocks of the text "
        f"± {paired['error']:.6f}",
        "KL divergence": f"{kl['mean']:.6f} ± {kl['error']:.6f}, median {kl['median']:.6f}, "
        f"99 % {kl['p99']:.6f}, maximum {kl['maximum']:.6f}",
        "change of probability": f"mean {shift['mean']:+.3%} ± {shift['error']:.3%}, "
        f"RMS {shift['rms']:.3%} ± {shift['rms_error']:.3%}",
        "same likeliest token": f"{same['share']:.3%} ± {same['error']:.3%}",
    }
    return [f"{name:{_WIDTH}}{value}" for name, value in rows.items()]


def statistics_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table of an importance matrix: the tensors whose inputs are largest come last."""
    width = max((len(row["name"]) for row in rows), default=0)
    lines = [
        f"{'tensor':{width}} {'matrices':>8} {'columns':>8} {'inputs':>10} {'mean x^2':>10} "
        f"{'largest':>10} {'evenness':>8}"
    ]
    for row in sorted(rows, key=lambda row: row["mean"]):
        missing = f", {row['unseen']} without inputs" if row["unseen"] else ""
        lines.append(
            f"{printable(row['name']):{width}} {row['matrices']:8} {row['width']:8} "
            f"{row['inputs']:10} {row['mean']:10.4g} {row['largest']:10.4g} "
            f"{row['evenness']:8.1%}{missing}"
        )
    return lines


def drift_lines(facts: dict[str, Any]) -> list[str]:
    """A table of what `drift` found: a line a type, then perplexity by position, then errors."""
    types, ends = facts["types"], facts["positions"]
    wide = max(len(row["type"]) for row in types)
    lines = [
        f"{printable(facts['file'])}: {facts['tokens']} tokens in {len(ends)} parts"
        f"{', interrupted' if facts['interrupted'] else ''}",
        f"{'states':{wide}} {'size':>11} {'perplexity':>11} {'nats over f32':>19}  "
        "error of the state, first part to last",
    ]
    for i, row in enumerate(types):
        errors = row["state_error_by_position"]
        line = f"{row['type']:{wide}} {size(row['state_bytes']):>11} {row['perplexity']:>11.4f}"
        if i:
            line += f" {row['difference']:+9.5f} ± {row['difference_error']:.5f}  "
            line += f"{errors[0]:7.2%} {sparkline(errors, 0)} {errors[-1]:7.2%}"
        lines.append(line)
    lines.append(f"\n{'perplexity to token':20} {_head(types)}")
    for part, end in enumerate(ends):
        cells = " ".join(f"{row['perplexity_by_position'][part]:13.4f}" for row in types)
        lines.append(f"{end:20} {cells}")
    lines.append(f"\n{'error at the end':20} {_head(types[1:])}")
    for i, name in enumerate(facts["tensors"]):
        cells = " ".join(f"{row['state_error_by_tensor'][-1][i]:13.2%}" for row in types[1:])
        lines.append(f"{printable(name):20} {cells}")
    return lines


def _head(types: list[dict[str, Any]]) -> str:
    return " ".join(f"{row['type']:>13}" for row in types)
