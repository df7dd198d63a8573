"""Which type a tensor gets: llama.cpp's rules as a table, and ours for recurrences."""

from __future__ import annotations

import random

import gguf
import pytest

from keelback.convert import OUTTYPES
from keelback.convert.mixture import (
    FILE_TYPES,
    Traits,
    Weight,
    Wishes,
    drives_recurrence,
    file_type,
    is_quantizable,
    override,
    tensor_type,
    types_of,
)
from keelback.engine import options
from keelback.kernels.errors import InvalidInput
from keelback.kernels.formats.blocks import BY_NAME, F16, F32
from keelback.kernels.formats.gguf import GGUF

LAYERS = 16
TRAITS = Traits("any", LAYERS, 0, 1)
#: Layers that the M mixtures favour: the first and last eighth, and every third between.
FAVOURED = {0, 1, 4, 7, 10, 13, 14, 15}


def matrix(name: str, *shape: int, block: str = "F16") -> Weight:
    return Weight(name, shape or (8, 256), BY_NAME[block])


def model(*roles: str, output: bool = True) -> list[Weight]:
    """LAYERS layers with these matrices, in an order that means nothing."""
    weights = [matrix(f"blk.{i}.{role}.weight") for i in range(LAYERS) for role in roles]
    weights += [matrix("token_embd.weight"), matrix("output_norm.weight", 256, block="F32")]
    if output:
        weights.append(matrix("output.weight"))
    random.Random(2).shuffle(weights)
    return weights


def layers_with(types: dict, role: str, block: str) -> set[int]:
    return {i for i in range(LAYERS) if types[f"blk.{i}.{role}.weight"].name == block}


def test_numbers_and_names_are_llamacpps():
    for kind in FILE_TYPES.values():
        theirs = "ALL_F32" if kind.name == "F32" else f"MOSTLY_{kind.name}"
        assert gguf.LlamaFileType[theirs] == kind.code
    assert file_type("q4_k_m") is FILE_TYPES["Q4_K_M"] is file_type("Q4_K")
    assert file_type("mxfp4").name == "MXFP4_MOE"


def test_the_command_line_offers_what_is_there():
    assert sorted(options.OUTTYPES.choices) == sorted(OUTTYPES)


@pytest.mark.parametrize(
    ("kind", "role", "expected"),
    [
        ("Q4_K_M", "attn_v", {"Q6_K": FAVOURED}),
        ("Q5_K_M", "attn_qkv", {"Q6_K": FAVOURED}),
        ("Q4_K_M", "ffn_down", {"Q6_K": FAVOURED}),
        ("Q4_K_S", "attn_v", {"Q5_K": {0, 1, 2, 3}}),
        ("Q4_K_S", "ffn_down", {"Q5_K": {0, 1}}),
        ("Q5_K_S", "ffn_down", {}),
        ("Q3_K_M", "attn_v", {"Q5_K": {0, 1}, "Q4_K": set(range(2, LAYERS))}),
        ("Q3_K_M", "ffn_down", {"Q5_K": {0}, "Q4_K": set(range(1, LAYERS))}),
        ("Q3_K_M", "attn_output", {"Q4_K": set(range(LAYERS))}),
        ("Q2_K", "attn_v", {"Q3_K": set(range(LAYERS))}),
        ("Q2_K", "ffn_down", {"Q3_K": set(range(LAYERS))}),
        ("IQ4_XS", "ffn_down", {"Q5_K": {0, 1}}),
        ("IQ4_NL", "attn_v", {}),
        ("Q4_0", "ffn_down", {}),
        ("Q6_K", "attn_v", {}),
    ],
)
def test_matrices_get_more_bits_by_role_and_depth(kind, role, expected):
    types = types_of(model(role, "ssm_in"), FILE_TYPES[kind], TRAITS)
    for block, layers in expected.items():
        assert layers_with(types, role, block) == layers
    base = FILE_TYPES[kind].block.name
    rest = set(range(LAYERS)).difference(*expected.values())
    assert layers_with(types, role, base) == rest
    assert layers_with(types, "ssm_in", base) == set(range(LAYERS))


def test_the_output_matrix_is_fine_also_where_it_is_the_embedding():
    kind = FILE_TYPES["Q4_K_M"]
    apart, tied = (types_of(model(output=output), kind, TRAITS) for output in (True, False))
    assert apart["output.weight"].name == tied["token_embd.weight"].name == "Q6_K"
    assert apart["token_embd.weight"].name == "Q4_K"


def test_an_importance_matrix_and_shared_keys_change_the_mixture():
    informed, wide = Wishes(importance=True), Traits("any", LAYERS, 0, 4)

    def chosen(kind: str, role: str, traits: Traits, wishes: Wishes) -> dict:
        return types_of(model(role), FILE_TYPES[kind], traits, wishes)

    assert layers_with(chosen("Q4_0", "ffn_down", TRAITS, informed), "ffn_down", "Q4_1") == {0, 1}
    assert not layers_with(chosen("IQ4_XS", "ffn_down", TRAITS, informed), "ffn_down", "Q5_K")
    everywhere = set(range(LAYERS))
    assert layers_with(chosen("IQ4_XS", "attn_v", wide, Wishes()), "attn_v", "Q5_K") == everywhere
    assert layers_with(chosen("Q2_K", "attn_v", wide, Wishes()), "attn_v", "Q4_K") == everywhere


def test_experts_count_by_layer_and_few_experts_are_favoured():
    names = [f"blk.{i}.ffn_down{part}" for i in range(LAYERS) for part in ("_exps", "_shexp")]
    weights = [matrix(f"{name}.weight", 4, 8, 256) for name in names]
    kind, many = FILE_TYPES["Q4_K_M"], Traits("any", LAYERS, 64, 1)
    assert layers_with(types_of(weights, kind, many), "ffn_down_shexp", "Q6_K") == FAVOURED
    eight = types_of(model("attn_v", "attn_k", "attn_output"), kind, Traits("any", LAYERS, 8, 1))
    for role, block in (("attn_v", "Q8_0"), ("attn_k", "Q8_0"), ("attn_output", "Q5_K")):
        assert layers_with(eight, role, block) == set(range(LAYERS))


def test_mxfp4_is_for_experts():
    weights = [matrix("blk.0.ffn_up_exps.weight", 4, 8, 256), matrix("blk.0.attn_q.weight")]
    weights.append(matrix("blk.0.attn_k_b.weight", 4, 8, 256))
    types = types_of(weights, FILE_TYPES["MXFP4_MOE"], TRAITS)
    assert [types[weight.name].name for weight in weights] == ["MXFP4", "Q8_0", "MXFP4"]
    only = types_of(weights, FILE_TYPES["MXFP4_MOE"], Traits("bailingmoe3", LAYERS, 4, 1))
    assert only["blk.0.attn_k_b.weight"].name == "Q8_0"


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [
        ("Q4_K_S", 160, "Q5_0"), ("Q5_K_S", 160, "Q5_1"), ("Q6_K", 160, "Q8_0"),
        ("Q2_K", 160, "Q4_0"), ("IQ4_XS", 160, "IQ4_NL"), ("Q4_K_S", 48, "F16"),
        ("Q8_0", 48, "F16"), ("IQ4_NL", 48, "F16"), ("BF16", 48, "BF16"),
    ],
)  # fmt: skip
def test_rows_that_blocks_do_not_fit_get_another_type(kind, width, expected):
    weight = matrix("blk.0.ssm_in.weight", 8, width, block="F32")
    assert types_of([weight], FILE_TYPES[kind], TRAITS)[weight.name].name == expected


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("output_norm.weight", (256,)), ("blk.0.ssm_a", (8, 256)), ("blk.0.ssm_dt.bias", (256,)),
        ("blk.0.ssm_norm.weight", (2, 256)), ("blk.0.ssm_conv1d.weight", (256, 4)),
        ("blk.0.ssm_conv1d_q.weight", (1, 256, 1, 4)), ("blk.0.shortconv.conv.weight", (256, 3)),
        ("blk.0.ffn_gate_inp.weight", (8, 256)), ("blk.0.ffn_gate_inp_shexp.weight", (1, 256)),
    ],
)  # fmt: skip
def test_what_is_small_or_no_product_stays_as_it_is(name, shape):
    weight = Weight(name, shape, F32)
    assert not is_quantizable(weight)
    assert types_of([weight], FILE_TYPES["Q2_K"], TRAITS)[name] is F32


# Recurrences.

RECURRENT = (
    "ssm_alpha", "ssm_beta", "ssm_ba", "ssm_x", "ssm_dt", "ssm_f_a", "ssm_f_b", "ssm_g_a",
    "ssm_g_b",
)  # fmt: skip


@pytest.mark.parametrize("role", RECURRENT)
@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K_M", "Q2_K", "IQ4_XS", "Q4_0"])
def test_what_drives_a_recurrence_keeps_eight_bits(kind, role):
    weights = model(role)
    types = types_of(weights, FILE_TYPES[kind], TRAITS)
    assert layers_with(types, role, "Q8_0") == set(range(LAYERS))
    for wishes in (Wishes(plain=True), Wishes(pure=True)):
        others = types_of(weights, FILE_TYPES[kind], TRAITS, wishes)
        assert layers_with(others, role, FILE_TYPES[kind].block.name) == set(range(LAYERS))
    asked = Wishes(overrides=(override(f"{role}=q5_k"),))
    assert layers_with(types_of(weights, FILE_TYPES[kind], TRAITS, asked), role, "Q5_K")


def test_narrow_rows_of_a_recurrence_are_f16_and_wide_types_stay():
    step = matrix("blk.0.ssm_dt.weight", 512, 48, block="F32")
    assert types_of([step], FILE_TYPES["Q4_K_M"], TRAITS)[step.name] is F16
    assert types_of([step], FILE_TYPES["BF16"], TRAITS)[step.name].name == "BF16"


def test_what_was_rounded_before_gets_no_more_bits():
    weight = matrix("blk.0.ssm_x.weight", block="Q4_K")
    assert types_of([weight], FILE_TYPES["Q6_K"], TRAITS)[weight.name].name == "Q4_K"


def test_full_size_gates_are_ordinary_matrices():
    assert not drives_recurrence(matrix("blk.0.ssm_f_a.weight", 2048, 2048))
    assert drives_recurrence(matrix("blk.0.ssm_f_a.weight", 128, 2048))
    assert not drives_recurrence(matrix("blk.0.ssm_in.weight", 128, 2048))


_SCAN, _DELTA = {"ssm_x", "ssm_dt"}, {"ssm_alpha", "ssm_beta"}
_KDA = {"ssm_beta", "ssm_f_a", "ssm_f_b", "ssm_g_a", "ssm_g_b"}
#: A tiny checkpoint of every kind of recurrence, and the roles that drive it. Those of Mamba-2 are
#: rows of a large matrix; convolutions alone have none.
DRIVERS = {
    "mamba-tied": _SCAN, "jamba-q8": _SCAN, "mamba2-g2": set(), "falcon-h1-q8": set(),
    "nemotron-q8": set(), "lfm2-q8": set(), "gdn-q8": _DELTA, "olmo-q8": _DELTA,
    "qwen35-q8": _DELTA, "next-q8": {"ssm_ba"}, "kimi-q8": _KDA, "kda-bounded": _KDA,
    "ling-q8": {"ssm_beta", "ssm_f_a", "ssm_g_a"},
}  # fmt: skip


@pytest.mark.parametrize("name", DRIVERS)
def test_converted_models_have_these_names(tiny_file, name):
    found = set()
    for info in GGUF(tiny_file(name, "f32")).tensors.values():
        # At the proportions of a model that is not tiny.
        if len(info.shape) > 1 and drives_recurrence(Weight(info.name, (1, 64), info.block)):
            found.add(info.name.split(".")[2])
    assert found == DRIVERS[name]


# Wishes.


def test_wishes_win_over_the_mixture_the_first_of_them():
    weights = model("attn_v", "ssm_in")
    wishes = Wishes(
        overrides=(override("blk[.]1[.].*=Q8_0"), override("ATTN_V=bf16"), override("attn=q2_k")),
        output=BY_NAME["Q5_K"],
        embedding=BY_NAME["Q3_K"],
    )
    types = types_of(weights, FILE_TYPES["Q4_K_M"], TRAITS, wishes)
    assert types["blk.1.attn_v.weight"].name == types["blk.1.ssm_in.weight"].name == "Q8_0"
    assert layers_with(types, "attn_v", "BF16") == set(range(LAYERS)) - {1}
    assert types["blk.2.ssm_in.weight"].name == "Q4_K"
    assert types["output.weight"].name == "Q5_K" and types["token_embd.weight"].name == "Q3_K"


def test_the_output_matrix_can_be_left_and_everything_be_alike():
    weights = model("attn_v", "ffn_down")
    left = types_of(weights, FILE_TYPES["Q4_K_M"], TRAITS, Wishes(leave_output=True))
    assert left["output.weight"] is F16
    pure = types_of(weights, FILE_TYPES["Q4_K_M"], TRAITS, Wishes(pure=True))
    assert {block.name for block in pure.values()} == {"Q4_K", "F32"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("attn_v", "names no type"), ("=q8_0", "names no type"),
        ("attn_v=q9", "cannot be written as 'q9'"), ("attn_v=i32", "cannot be written"),
        ("attn_(v=q8_0", "no regular expression"),
    ],
)  # fmt: skip
def test_wishes_that_mean_nothing_get_a_sentence(text, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        override(text)


def test_unknown_types_get_a_sentence():
    with pytest.raises(InvalidInput, match="Q4_K_M"):
        file_type("Q4_K_XL")
    with pytest.raises(InvalidInput, match="Q4_K,"):
        tensor_type("Q4_K_M")


@pytest.mark.parametrize("value", [None, "many", -3, float("inf"), [], [None], ["x"], {}])
def test_keys_that_make_no_sense_count_as_missing(value):
    keys = ("block_count", "expert_count", "attention.head_count", "attention.head_count_kv")
    pairs = {"general.architecture": "x", **{f"x.{key}": value for key in keys}}
    assert Traits.of(pairs) == Traits("x", 0, 0, 0)
    types_of(model("attn_v", "ffn_down"), FILE_TYPES["Q4_K_M"], Traits.of(pairs))


def test_heads_are_those_of_the_first_layer():
    pairs = {"general.architecture": "x", "x.block_count": 4, "x.attention.head_count": 8}
    assert Traits.of(pairs).queries == 1
    assert Traits.of(pairs | {"x.attention.head_count_kv": [0, 2]}).queries == 0
    assert Traits.of(pairs | {"x.attention.head_count_kv": [2, 0]}).queries == 4
