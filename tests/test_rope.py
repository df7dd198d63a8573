"""Rotary positions of files and checkpoints: what is run, and what gets a sentence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from keelback.convert.config import Config
from keelback.convert.rope import rope_keys, speed_keys
from keelback.kernels.errors import InvalidFile, UnsupportedModel
from keelback.models.hyperparameters import Hyperparameters
from keelback.models.rope import speeds

YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 4096}


def of_file(base: float = 1e4, **scaling: Any) -> dict[str, float]:
    metadata = {f"m.rope.scaling.{key}": value for key, value in scaling.items()}
    return speeds(Hyperparameters({"m.rope.freq_base": base} | metadata, Path("x.gguf"), "m"), 64)


def of_config(**rope: Any) -> dict[str, Any]:
    values = {"rope_parameters": rope, "max_position_embeddings": 4096}
    return rope_keys(Config(Path("config.json"), values), 64, theta=1e4)


def test_a_null_hides_no_value_beside_it():
    values = {"rope_theta": 123.0, "rope_parameters": {"rope_theta": None, "rope_type": "default"}}
    assert speed_keys(Config(Path("config.json"), values), theta=1e4) == {"rope.freq_base": 123}


def test_a_factor_without_a_type_is_linear():
    assert of_file(factor=4.0) == of_file(type="linear", factor=4.0)
    assert of_file(factor=4.0)["scale"] == 0.25 and of_file(type="none", factor=4.0) == of_file()
    metadata = {"m.rope.scale_linear": 4.0}
    assert speeds(Hyperparameters(metadata, Path("x.gguf"), "m"), 64)["scale"] == 0.25


def test_what_is_turned_by_yarn_is_multiplied_as_the_file_says():
    usual = 1 + 0.1 * math.log(4)
    assert of_file(**YARN)["magnitude"] == pytest.approx(usual)
    assert of_file(**YARN, attn_factor=2.0)["magnitude"] == pytest.approx(2 * usual)
    assert of_file(**YARN, yarn_attn_factor=1.5)["magnitude"] == 1.5
    assert of_file(**{**YARN, "factor": 0.5})["magnitude"] == 1


@pytest.mark.parametrize(
    ("base", "scaling"),
    [
        (1.0, YARN), (1e4, {**YARN, "yarn_beta_fast": 1e308}),
        (1e4, {**YARN, "yarn_beta_fast": 5e-324}), (1e4, {**YARN, "yarn_beta_slow": 5e-324}),
    ],
)  # fmt: skip
def test_numbers_that_do_not_go_together_get_a_sentence(base, scaling):
    with pytest.raises(InvalidFile, match=r"x\.gguf: m\.rope\.freq_base.* do not go together"):
        of_file(base, **scaling)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [({"type": "longrope"}, "is 'longrope'"), ({**YARN, "yarn_ext_factor": 0.5}, "ext_factor")],
)
def test_scalings_that_are_not_run_get_a_sentence(scaling, said):
    with pytest.raises(UnsupportedModel, match=said):
        of_file(**scaling)


def test_a_config_that_names_yarns_own_factor_is_the_same_model():
    yarn = {"rope_type": "yarn", "factor": 8.0}
    named = of_config(**yarn, attention_factor=1 + 0.1 * math.log(8))
    assert named.pop("rope.scaling.attn_factor") == pytest.approx(1)
    assert named == of_config(**yarn) == of_config(**yarn, mscale=1.0)
    assert of_config(**yarn, attention_factor=1.0)["rope.scaling.attn_factor"] < 0.9


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_theta": 1.0}, "rope_theta is 1, not a number above 1"),
        ({"partial_rotary_factor": 0.05}, "turns 3 values of 64"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0}, "mscale_all_dim"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "truncate"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'"),
    ],
)
def test_configs_that_cannot_be_converted_get_a_sentence(rope, said):
    with pytest.raises((InvalidFile, UnsupportedModel), match=said):
        of_config(**rope)
