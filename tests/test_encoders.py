"""Encoders of tensor types: against the reference where it can write one, and by their errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from keelback.convert import encoders
from keelback.convert.encoders import encode
from keelback.kernels.errors import InvalidInput
from keelback.kernels.formats import blocks
from keelback.kernels.formats.blocks import BY_NAME

#: What the reference writes, and what only a search does.
REFERENCE = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4")
SEARCHED = ("IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TYPES = (*REFERENCE[3:], *SEARCHED)
ROWS, WIDTH = 24, 1024

#: llama.cpp's errors (`error` below) for the same values: normal without and with importance, then
#: Laplace's without and with; made with its `ggml_quantize_chunk`, version b11549.
LLAMA_CPP: dict[str, tuple[float, float, float, float]] = {
    "Q4_0": (7.3094e-03, 5.2367e-03, 1.1559e-02, 9.8011e-03),
    "Q4_1": (6.0035e-03, 3.1796e-03, 8.2394e-03, 4.8575e-03),
    "Q5_0": (1.7968e-03, 1.2745e-03, 2.8581e-03, 2.4251e-03),
    "Q5_1": (1.4166e-03, 7.4143e-04, 1.9787e-03, 1.1666e-03),
    "MXFP4": (1.3010e-02, 1.2850e-02, 1.6031e-02, 1.6850e-02),
    "IQ4_NL": (5.7396e-03, 4.1888e-03, 7.8035e-03, 6.1817e-03),
    "IQ4_XS": (5.8267e-03, 4.2964e-03, 7.9391e-03, 6.3492e-03),
    "Q2_K": (8.7931e-02, 4.1971e-02, 1.1422e-01, 5.7157e-02),
    "Q3_K": (2.2235e-02, 1.4381e-02, 3.1132e-02, 2.3538e-02),
    "Q4_K": (5.0075e-03, 3.3024e-03, 7.0715e-03, 5.0916e-03),
    "Q5_K": (1.2896e-03, 8.8655e-04, 1.8404e-03, 1.4470e-03),
    "Q6_K": (3.1199e-04, 2.1896e-04, 4.7871e-04, 3.9254e-04),
}


def weights(kind: str = "normal", rows: int = ROWS) -> np.ndarray:
    rng = np.random.default_rng(5)
    return (getattr(rng, kind)(size=(rows, WIDTH)) / 50).astype(np.float32)


def importance(width: int = WIDTH) -> np.ndarray:
    return np.exp(1.5 * np.random.default_rng(6).normal(size=width)).astype(np.float32)


def decoded(data: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return blocks.dequantize(data.reshape(-1), BY_NAME[name], shape)


def coded(values: np.ndarray, name: str, columns: np.ndarray | None = None) -> np.ndarray:
    """Values as they come back."""
    return decoded(encode(values, BY_NAME[name], columns), name, values.shape)


def error(values: np.ndarray, others: np.ndarray, columns: np.ndarray | None = None) -> float:
    """The mean square of what is lost, columns weighed by their importance, against the values'."""
    weight = 1 if columns is None else columns.astype(np.float64)
    lost = ((values.astype(np.float64) - others) ** 2 * weight).sum()
    return float(lost / (values.astype(np.float64) ** 2 * weight).sum())


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_encoder_writes_the_same_bytes(name):
    values = weights(rows=4)
    values[1, :64] = 0
    expected = quants.quantize(values, GGMLQuantizationType[name]).view(np.uint8)
    assert np.array_equal(encode(values, BY_NAME[name]), expected)


@pytest.mark.parametrize("name", SEARCHED)
def test_decoders_agree_on_what_was_written(name):
    values = weights(rows=4)
    data = encode(values, BY_NAME[name])
    assert data.shape == (4, BY_NAME[name].row_bytes(WIDTH)) and data.dtype == np.uint8
    reference = quants.dequantize(data, GGMLQuantizationType[name])
    assert np.array_equal(reference, decoded(data, name, values.shape))
    assert error(values, reference) < 0.1


@pytest.mark.parametrize("name", TYPES)
def test_no_more_is_lost_than_llama_cpp_loses(name):
    columns = importance()
    normal, laplace = weights("normal"), weights("laplace")
    lost = [
        error(values, coded(values, name, weighed), weighed)
        for values in (normal, laplace)
        for weighed in (None, columns)
    ]
    # The two references round a few halves differently.
    assert np.all(np.array(lost) <= np.array(LLAMA_CPP[name]) * 1.002)


@pytest.mark.parametrize("name", TYPES)
def test_important_columns_lose_less(name):
    values, columns = weights(), np.ones(WIDTH, np.float32)
    columns[::4] = 30
    alike, weighed = coded(values, name, np.ones_like(columns)), coded(values, name, columns)
    assert error(values[:, ::4], weighed[:, ::4]) < 0.97 * error(values[:, ::4], alike[:, ::4])
    assert error(values, weighed) > error(values, alike)


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_that_is_the_same_everywhere_says_nothing(name):
    values = weights(rows=2)
    expected = encode(values, BY_NAME[name])
    for level in (0, 1, 7e5):
        columns = np.full(WIDTH, level, np.float32)
        close = error(values, coded(values, name, columns)) / error(
            values, decoded(expected, name, values.shape)
        )
        assert 0.99 < close < 1.01
    assert np.array_equal(encode(values, BY_NAME[name], np.zeros(WIDTH, np.float32)), expected)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighed", [False, True])
def test_bytes_do_not_depend_on_how_rows_are_split(name, weighed):
    values, columns = weights(rows=21), importance() if weighed else None
    whole = encode(values, BY_NAME[name], columns)
    cuts = [0, 1, 2, 9, 21]
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(
            lambda first, last: encode(values[first:last], BY_NAME[name], columns), cuts, cuts[1:]
        )
    assert np.array_equal(np.concatenate(list(parts)), whole)


@pytest.mark.parametrize("name", TYPES)
def test_what_was_encoded_once_hardly_changes_when_it_is_encoded_again(name):
    values, columns = weights(rows=8), np.ones(WIDTH, np.float32)
    once = coded(values, name, columns)
    again = coded(once, name, columns)
    assert error(once, again) < 0.1 * error(values, once)


@pytest.mark.parametrize("name", TYPES)
def test_zeros_stay_zeros(name):
    values = weights(rows=3)
    values[1] = 0
    for columns in (None, importance()):
        assert not coded(values, name, columns)[1].any()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [0.5, -0.5, 0.2, -700.0])
def test_constants_come_back(name, value):
    values = np.full((2, 512), value, np.float32)
    for columns in (None, importance(512)):
        within = 0.15 if name == "MXFP4" else 0.001
        assert np.abs(coded(values, name, columns) / value - 1).max() < within


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_blocks_of_one_sign(name, sign):
    values = sign * (np.abs(weights(rows=4)) + np.float32(0.05))
    for columns in (None, importance()):
        assert error(values, coded(values, name, columns)) < 0.06


@pytest.mark.parametrize("name", TYPES)
def test_one_outlier_costs_its_own_block_only(name):
    values = weights(rows=2)
    plain = coded(values, name)
    values[0, 300] = 40
    lost = np.abs(values - coded(values, name))
    assert lost[0, 300] < 40 / 4
    block = BY_NAME[name].elements
    first = 300 // block * block
    outside = np.ones(WIDTH, bool)
    outside[first : first + block] = False
    assert np.array_equal(coded(values, name)[:, outside], plain[:, outside])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("size", [1e-45, 1e-39, 3e-30, 1e-9])
def test_values_too_small_for_a_half_become_small(name, size):
    values = (weights(rows=2) * 50 * size).astype(np.float32)
    for columns in (None, importance()):
        back = coded(values, name, columns)
        assert np.isfinite(back).all() and np.abs(back).max() <= max(4 * np.abs(values).max(), 2e-6)


@pytest.mark.parametrize("name", SEARCHED)
def test_scales_below_a_halfs_least_do_not_vanish(name):
    values = weights(rows=2) * np.float32(2e-4)
    assert error(values, coded(values, name)) < 0.4


@pytest.mark.parametrize("name", TYPES)
def test_the_largest_values_that_a_type_holds(name):
    limit = encoders.LIMITS.get(BY_NAME[name], 1e30)
    values = (weights(rows=2) * 50).clip(-4, 4) / 4 * np.float32(limit * 0.999)
    for columns in (None, importance()):
        back = coded(values, name, columns)
        assert np.isfinite(back).all() and error(values, back, columns) < 0.4


def test_what_cannot_be_written_is_refused_with_a_sentence():
    values = weights(rows=1)
    with pytest.raises(InvalidInput, match="nothing here writes the type IQ2_XS; choose"):
        encode(values, BY_NAME["IQ2_XS"])
    for name in ("F16", "Q8_0", *TYPES):
        block = BY_NAME[name]
        if block in encoders.LIMITS:
            values[0, 7] = -1.01 * encoders.LIMITS[block]
            with pytest.raises(InvalidInput, match=f"too large for {name}; choose BF16"):
                encode(values, block)


@pytest.mark.parametrize(
    "columns",
    [np.ones(WIDTH - 1), np.ones((1, WIDTH)), np.full(WIDTH, np.inf), np.full(WIDTH, -1.0)],
)
def test_importance_that_is_none_is_refused(columns):
    with pytest.raises(InvalidInput, match=f"importance has to be {WIDTH} finite numbers"):
        encode(weights(rows=1), BY_NAME["Q6_K"], columns.astype(np.float32))


@pytest.mark.parametrize("shape", [(2, 288), (256,), (1, 2, 256)])
def test_rows_that_do_not_divide_into_blocks_are_refused(shape):
    with pytest.raises(InvalidInput, match="are no rows of Q4_K, whose blocks hold 256"):
        encode(np.zeros(shape, np.float32), BY_NAME["Q4_K"])


def test_scales_of_mxfp4_are_the_reference_s_from_the_smallest_to_the_largest():
    values = weights(rows=1).reshape(-1, 32) * 2.0 ** np.linspace(-112, 120, WIDTH // 32)[:, None]
    values = np.concatenate([values, np.full((4, 32), 2)]).astype(np.float32)
    # The logarithm of some is rounded up to a whole number; others lie on the edge of two codes.
    values[-4:, :4] = np.nextafter(np.float32([[2], [2**-9], [4096], [1]]), np.float32(0))
    values[-3:, 8:16] *= np.arange(8, dtype=np.float32) / 8
    expected = quants.quantize(values, GGMLQuantizationType.MXFP4)
    assert np.array_equal(encode(values, BY_NAME["MXFP4"]), expected)


def test_kernels_are_compiled_at_once_and_before_they_are_needed(monkeypatch):
    asked = []
    monkeypatch.setattr(encoders, "addresses", lambda kernels, *told: asked.append(kernels))
    encoders.prepare([BY_NAME["Q6_K"], BY_NAME["F16"], BY_NAME["Q4_K"], BY_NAME["Q6_K"]], print)
    module = "keelback.kernels.encode_cpu"
    assert asked == [[("encode.q4_k", module), ("encode.q6_k", module)]]
