"""Elementary functions against float64, over all of their range."""

from __future__ import annotations

import numpy as np
import pytest

from harness import Case
from keelback.kernels.op import catalogue

EXTREMES = (-1e4, -90.0, -87.4, -20.0, -1e-8, 0.0, 1e-8, 20.0, 20.0001, 87.4, 90.0, 1e4)
SMALLEST = float(np.finfo(np.float32).tiny)
#: exp is good for 2 ulp, and each of the functions made of it adds a rounding or two.
ULPS = 5


def sweep() -> np.ndarray:
    """Inputs (T, 257) dense around 0, wide beyond, with the extremes in front."""
    wide = np.linspace(-100, 100, 5 * 257, dtype=np.float32)
    tiny = np.geomspace(1e-30, 1, 257, dtype=np.float32)
    near = np.linspace(-2, 2, 7 * 257, dtype=np.float32)
    values = np.concatenate([wide, tiny, -tiny, near]).reshape(-1, 257)
    values[0, : len(EXTREMES)] = EXTREMES
    return values


def _close(got: np.ndarray, want: np.ndarray) -> None:
    """Within ULPS of float64's answer; a factor that is no normal float32 may count as 0."""
    assert np.isfinite(got).all()
    error = np.abs(got.astype(np.float64) - want)
    bound = ULPS * np.finfo(np.float32).eps / 2 * np.abs(want) + 100 * SMALLEST
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), (worst, got[worst], want[worst])


def _exact_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


FUNCTIONS = {
    "sigmoid": _exact_sigmoid,
    "silu": lambda x: x * _exact_sigmoid(x),
    "softplus": lambda x: np.where(x > 20, x, np.logaddexp(0, x)),
}


def _play_unary(op: str, x: np.ndarray) -> np.ndarray:
    tried = Case(catalogue()[op], rows={"x": x}, lengths=(len(x),))
    return tried.play(tried.machine()).rows


@pytest.mark.parametrize("op", FUNCTIONS)
def test_functions_agree_with_float64_over_all_of_their_range(op):
    x = sweep()
    _close(_play_unary(op, x), FUNCTIONS[op](x.astype(np.float64)))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_nan_goes_through_as_nan_and_stays_in_its_lane(op):
    x = np.linspace(-3, 3, 35, dtype=np.float32).reshape(1, 35)
    x[0, [0, 15, 16, 34]] = np.nan
    assert np.array_equal(np.isnan(_play_unary(op, x)), np.isnan(x))


def test_exp_agrees_with_float64_over_all_of_its_range():
    # One step of a scan from a state of ones, with nothing written, is exp(dt a).
    x = sweep()
    x = x[:, :200].reshape(-1)[None]
    x = np.clip(x, -1e4, 88)
    ones, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    tried = Case(
        catalogue()["selective_scan"],
        rows={"x": 0 * x, "dt": x, "b": zero, "c": ones},
        weights={"a": np.ones((x.size, 1), np.float32), "d": np.zeros(x.size, np.float32)},
        states={"state": np.ones((1, 1, x.size), np.float32)},
        attributes={"d_state": 1},
    )
    _close(tried.play(tried.machine()).rows, np.exp(x.astype(np.float64)))
