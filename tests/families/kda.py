"""Tiny checkpoints of flash-linear-attention's `kda`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tiny import Family

Shapes = Iterator[tuple[str, tuple[int, ...]]]

_DEFAULTS = {
    "architectures": ["KDAForCausalLM"],
    "attn_mode": "chunk",
    "num_heads": 2,
    "num_v_heads": None,
    "head_dim": 12,
    "expand_v": 1.0,
    "use_short_conv": True,
    "conv_size": 4,
    "allow_neg_eigval": False,
    "safe_gate": False,
    "lower_bound": None,
    "norm_eps": 1e-6,
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "intermediate_size": 72,
    "attn": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def shapes(c: dict[str, Any]) -> Shapes:
    hidden, middle = c["hidden_size"], c["intermediate_size"]
    attention = (c["attn"] or {"layers": []})["layers"]
    yield "model.embeddings.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        yield at + "attn_norm.weight", (hidden,)
        mixer = _attention if i in attention else _delta
        yield from ((f"{at}attn.{name}", shape) for name, shape in mixer(c))
        yield at + "mlp_norm.weight", (hidden,)
        yield at + "mlp.gate_proj.weight", (middle, hidden)
        yield at + "mlp.up_proj.weight", (middle, hidden)
        yield at + "mlp.down_proj.weight", (hidden, middle)
    yield "model.norm.weight", (hidden,)


def _attention(c: dict[str, Any]) -> Shapes:
    hidden, heads = c["hidden_size"], c["attn"]["num_heads"]
    shared = hidden // heads * c["attn"]["num_kv_heads"]
    for part, rows in (("q", hidden), ("k", shared), ("v", shared), ("o", hidden)):
        yield f"{part}_proj.weight", (rows, hidden)


def _delta(c: dict[str, Any]) -> Shapes:
    hidden, heads, d_key = c["hidden_size"], c["num_v_heads"] or c["num_heads"], c["head_dim"]
    d_value = int(d_key * c["expand_v"])
    keys, values = c["num_heads"] * d_key, heads * d_value
    for part, rows in (("q", keys), ("k", keys), ("v", values)):
        yield f"{part}_proj.weight", (rows, hidden)
        if c["use_short_conv"]:
            yield f"{part}_conv1d.weight", (rows, 1, c["conv_size"])
    for gate, rows in (("f", heads * d_key), ("g", values)):
        yield f"{gate}_proj.0.weight", (d_value, hidden)
        yield f"{gate}_proj.1.weight", (rows, d_value)
    yield "g_proj.1.bias", (values,)
    yield "b_proj.weight", (heads, hidden)
    yield "A_log", (heads,)
    yield "dt_bias", (heads * d_key,)
    yield "o_norm.weight", (d_value,)
    yield "o_proj.weight", (hidden, values)


# fmt: off
FAMILIES = [
    Family(
        "kda", _DEFAULTS, shapes,
        [
            ("kda-pure", 40, 61, {}),
            # Short queries and keys make the 1e-6 inside their norms visible.
            ("kda-shared", 36, 67, {
                "num_v_heads": 4, "expand_v": 1.5, "head_dim": 8, "conv_size": 3,
                "allow_neg_eigval": True, "norm_eps": 1e-5, "tie_word_embeddings": True,
                "gain": {"q_conv1d": 0.03, "k_conv1d": 0.03, "v_conv1d": 0.1},
            }),
            ("kda-bounded", 48, 59, {
                "num_hidden_layers": 3, "use_short_conv": False, "safe_gate": True,
                "lower_bound": -3.0,
                "attn": {"layers": [1], "num_heads": 3, "num_kv_heads": 1, "rope_theta": 500.0},
            }),
        ],
        said=("kda-pure", "kda-shared", "kda-bounded"),
    )
]
# fmt: on
