"""Hybrids of attention and recurrence: files, states with KV pages, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import keelback
import tiny
from checkpoints import edited, refused
from harness import memory
from keelback.convert import convert
from keelback.engine.info import describe
from keelback.engine.state import PAGE_ROWS
from keelback.kernels.formats.gguf import GGUF
from rewriting import logits, rewritten, tensor

# ---- files


def test_rotary_pairs_are_laid_side_by_side(tiny_file):
    hf = tiny.weights("granite-rope")["model.layers.0.self_attn.q_proj.weight"]
    ours = tensor(tiny_file("granite-rope", "f32"), "blk.0.attn_q.weight")
    # 4 heads of 10 values: (0, 5), (1, 6) and so on.
    order = [head * 10 + i + half for head in range(4) for i in range(5) for half in (0, 5)]
    assert np.array_equal(ours, hf[order])
    bias = tiny.weights("granite-rope")["model.layers.0.self_attn.q_proj.bias"]
    assert np.array_equal(
        tensor(tiny_file("granite-rope", "f32"), "blk.0.attn_q.bias"), bias[order]
    )


def test_only_the_values_that_bamba_turns_are_rearranged(tiny_file):
    path = tiny_file("bamba-grouped", "f32")
    hf = tiny.weights("bamba-grouped")["model.layers.1.self_attn.k_proj.weight"]
    order = [12 * head + i for head in range(2) for i in (0, 3, 1, 4, 2, 5, *range(6, 12))]
    assert np.array_equal(tensor(path, "blk.1.attn_k.weight"), hf[order])
    metadata = GGUF(path).metadata
    assert metadata["granitehybrid.rope.dimension_count"] == 6
    assert metadata["granitehybrid.rope.rearranged_count"] == 6
    assert metadata["granitehybrid.attention.head_count_kv"].tolist() == [0, 2, 0]


def test_gate_and_up_are_taken_apart_gate_first(tiny_file):
    path, hf = tiny_file("granite-moe", "f32"), tiny.weights("granite-moe")
    both = hf["model.layers.2.block_sparse_moe.input_linear.weight"]
    shared = hf["model.layers.2.shared_mlp.input_linear.weight"]
    for part, at in (("gate", 0), ("up", 1)):
        experts = tensor(path, f"blk.2.ffn_{part}_exps.weight")
        assert np.array_equal(experts, both[:, 20 * at : 20 * at + 20])
        matrix = tensor(path, f"blk.2.ffn_{part}_shexp.weight")
        assert np.array_equal(matrix, shared[28 * at : 28 * at + 28])
    down = hf["model.layers.2.block_sparse_moe.output_linear.weight"]
    assert np.array_equal(tensor(path, "blk.2.ffn_down_exps.weight"), down)


def test_queries_keys_and_values_in_one_matrix_give_the_same_bits(tiny_file, tmp_path):
    path, ids = tiny_file("granite-rope", "f32"), tiny.ids("granite-rope", 20)
    joined: dict[str, Any] = {}
    for i in (0, 2):
        for end in ("weight", "bias"):
            names = [f"blk.{i}.attn_{part}.{end}" for part in "qkv"]
            joined[f"blk.{i}.attn_qkv.{end}"] = np.concatenate([tensor(path, n) for n in names])
            joined |= dict.fromkeys(names)
    other = rewritten(path, tmp_path / "joined.gguf", {}, joined)
    assert np.array_equal(logits(other, ids), logits(path, ids))


def test_heads_rearranged_as_a_whole_give_the_same_logits(tiny_file, tmp_path):
    # What llama.cpp's converter makes of a head that is turned in part.
    path, ids = tiny_file("bamba-grouped", "f32"), tiny.ids("bamba-grouped", 20)
    changed = {}
    for part, heads in (("q", 4), ("k", 2)):
        hf = tiny.weights("bamba-grouped")[f"model.layers.1.self_attn.{part}_proj.weight"]
        whole = hf.reshape(heads, 2, 6, -1).swapaxes(1, 2).reshape(hf.shape)
        changed[f"blk.1.attn_{part}.weight"] = np.ascontiguousarray(whole)
    keys = {"granitehybrid.rope.rearranged_count": None}
    got = logits(rewritten(path, tmp_path / "whole.gguf", keys, changed), ids)
    np.testing.assert_allclose(got, logits(path, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attention.head_count_kv", None, r"lacks the key granitehybrid\.attention\.head_count_kv"),
        ("attention.head_count_kv", [0, 2], "not 3 whole numbers"),
        ("attention.head_count_kv", [0, -2, 0], "not 3 whole numbers"),
        ("attention.head_count_kv", [0, 4, 0], r"blk\.1\.attn_k"),
        ("attention.head_count_kv", [0, 0, 0], r"blk\.1\.ssm_in"),
        ("attention.head_count_kv", "many", "whole numbers"),
        ("attention.head_count", 7, "a divisor of 96"),
        ("attention.head_count", [6, 0, 6], "0, not a whole number above zero"),
        ("attention.key_length", 15, r"blk\.1\.attn_q"),
        ("rope.dimension_count", 7, "7 values"),
        ("rope.dimension_count", 10, "up to half"),
        ("rope.scaling.type", "longrope", r"rope\.scaling\.type is .longrope."),
        ("expert_used_count", 6, "6 experts cannot be chosen from 5"),
        ("expert_shared_feed_forward_length", 95, r"blk\.0\.ffn_gate_shexp"),
        ("feed_forward_length", 32, r"blk\.0\.ffn_gate_exps"),
    ],
)
def test_files_whose_keys_do_not_fit_get_a_sentence(tiny_file, tmp_path, key, value, said):
    path = tiny_file("granite-q8", "f32")
    changes = {f"granitehybrid.{key}": value}
    with pytest.raises(keelback.KeelbackError, match=said):
        logits(rewritten(path, tmp_path / "odd.gguf", changes, {}), np.array([1]))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("granite-moe", {"layer_types": ["attention"] * 3}, "all layers are attention"),
        ("granite-moe", {"layer_types": ["mamba"]}, "does not name 3 layers"),
        ("granite-moe", {"layer_types": ["mamba", "conv", "mamba"]}, "names 'conv'"),
        ("granite-moe", {"layer_types": [["mamba"], "mamba", {}]}, r"names \"\['mamba'\]\""),
        ("granite-moe", {"head_dim": 8}, "head_dim is 8"),
        ("granite-moe", {"num_key_value_heads": 4}, "num_attention_heads is 6"),
        ("granite-moe", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7"),
        ("granite-moe", {"mamba_n_groups": 5}, "mamba_n_groups 5"),
        ("granite-moe", {"mamba_d_head": 7}, "mamba_d_head is 7"),
        ("granite-moe", {"position_embedding_type": "alibi"}, "'alibi'"),
        ("granite-rope", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
        ("granite-rope", {"rope_theta": 0.5}, "rope_theta is 0.5"),
        ("granite-rope", {"rope_parameters": [1]}, "rope_parameters is no object"),
        ("granite-moe", {"residual_multiplier": "half"}, "residual_multiplier is 'half'"),
        ("bamba-grouped", {"attn_rotary_emb": 12}, "attn_rotary_emb is 12"),
        ("bamba-grouped", {"attn_layer_indices": ["1"]}, "no list of whole numbers"),
        ("bamba-grouped", {"attn_layer_indices": [0]}, r"lacks the tensor model\.layers\.0\.self_"),
    ],
)
def test_checkpoints_that_cannot_be_converted_get_a_sentence(tmp_path, name, changes, said):
    refused(edited(name, tmp_path, **changes), said, keelback.KeelbackError)


@pytest.mark.parametrize("offset", ["1", [1], 2, -1, 1.5])
def test_an_offset_that_no_layer_has_gets_a_sentence(tmp_path, offset):
    changes = {"attn_layer_indices": ..., "attn_layer_period": 2, "attn_layer_offset": offset}
    folder = edited("bamba-grouped", tmp_path, **changes)
    refused(folder, "attn_layer_offset is .*, not a whole", keelback.InvalidFile)


def test_layers_of_attention_are_found_by_period_too(tmp_path):
    changes = {"attn_layer_indices": ..., "attn_layer_period": 2, "attn_layer_offset": 1}
    folder = edited("bamba-grouped", tmp_path, **changes)
    path = convert(folder, tmp_path / "out.gguf")
    assert GGUF(path).metadata["granitehybrid.attention.head_count_kv"].tolist() == [0, 2, 0]


def test_positions_of_granite_and_bamba_are_scaled_as_those_of_others(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    for name, rope in (("granite-rope", yarn), ("bamba-grouped", {"type": "linear", "factor": 2})):
        folder = edited(name, tmp_path, rope_scaling=rope, rope_theta=123.0)
        keys = GGUF(convert(folder, tmp_path / "out.gguf")).metadata
        scaling = {key.split(".")[-1]: keys[key] for key in keys if ".rope.scaling." in key}
        assert scaling.pop("finetuned") is True
        assert scaling.pop("original_context_length", None) == rope.get(
            "original_max_position_embeddings"
        )
        assert scaling == {"type": rope.get("rope_type", "linear"), "factor": rope["factor"]}
        assert keys["granitehybrid.rope.freq_base"] == 123


# ---- states


def test_a_state_tells_what_it_takes_fixed_and_for_every_token(tiny_file, tiny_model):
    model = tiny_model("granite-q8", "q8_0")
    # Two layers of Mamba-2: 3 rows of 192 + 2 * 2 * 16 channels, and 12 heads of 16 by 16. One of
    # attention: 2 heads of 16 for keys and as much for values.
    fixed, per_token = 2 * 4 * (3 * 256 + 12 * 16 * 16), 2 * 2 * 2 * 16
    told = describe(str(tiny_file("granite-q8", "q8_0")))["state_bytes"]
    assert told == {"fixed": fixed, "per_token": per_token}
    _, state = model.forward(tiny.ids("granite-q8", 70))
    assert state.nbytes == fixed + 70 * per_token


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 130])
def test_a_state_with_pages_is_cloned_and_restored_whole(tiny_model, tmp_path, cut):
    model, ids = tiny_model("granite-q8", "q8_0"), tiny.ids("granite-q8", 150)
    wanted, after = model.forward(ids)
    _, state = model.forward(ids[:cut])
    state.save(tmp_path / "state.safetensors")
    fork, before = state.clone(), memory(state)
    model.forward(ids[::-1][:70].copy(), fork)
    full = cut // PAGE_ROWS
    assert all(fork.pages[i] is state.pages[i] for i in range(full)) and memory(state) == before
    loaded = keelback.State.load(tmp_path / "state.safetensors", model)
    assert memory(loaded) == before and loaded.position == cut
    for start in (state, loaded):
        got, end = model.forward(ids[cut:], start)
        assert got.tobytes() == wanted.tobytes() and memory(end) == memory(after)


def test_a_cancelled_prompt_leaves_pages_that_go_on_as_if_nothing_had_been(tiny_model):
    model, ids = tiny_model("granite-q8", "q8_0"), tiny.ids("granite-q8", 600)
    wanted, after = model.forward(ids)
    state, cancel = model.new_state(), keelback.engine.threads.CancelFlag()
    with pytest.raises(KeyboardInterrupt):
        model.forward(ids, state, progress=lambda read: cancel.set(), cancel=cancel)
    assert state.position == 512
    got, state = model.forward(ids[512:], state)
    assert got.tobytes() == wanted.tobytes() and memory(state) == memory(after)
