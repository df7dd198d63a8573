"""mamba_ssm's models by their source's equations, token by token, in NumPy's float64.

The library needs a GPU. Names of tensors and keys of the config are its own; read for this were
MixerModel, Block, MHA, GatedMLP, Mamba and Mamba2 of mamba_ssm 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

EPS = 1e-5
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def attends(c: dict[str, Any], i: int) -> bool:
    return i in c.get("attn_layer_idx", [])


def shapes(c: dict[str, Any]) -> Shapes:
    """Names and shapes of the tensors on disk."""
    d_model = c["d_model"]
    yield "backbone.embedding.weight", (c["vocab_size"], d_model)
    for i in range(c["n_layer"]):
        at = f"backbone.layers.{i}."
        yield at + "norm.weight", (d_model,)
        second = c["ssm_cfg"].get("layer") == "Mamba2"
        kind = _attention_shapes if attends(c, i) else _mamba2_shapes if second else _mamba_shapes
        yield from ((at + f"mixer.{name}", shape) for name, shape in kind(c))
        if c.get("d_intermediate"):
            middle = math.ceil(c["d_intermediate"] / 128) * 128
            yield at + "norm2.weight", (d_model,)
            yield at + "mlp.fc1.weight", (2 * middle, d_model)
            yield at + "mlp.fc2.weight", (d_model, middle)
    yield "backbone.norm_f.weight", (d_model,)
    yield "lm_head.weight", (c["vocab_size"], d_model)


def _attention_shapes(c: dict[str, Any]) -> Shapes:
    d_model, attn = c["d_model"], c["attn_cfg"]
    heads, d_head = attn["num_heads"], attn.get("head_dim", d_model // attn["num_heads"])
    rows = (heads + 2 * attn.get("num_heads_kv", heads)) * d_head
    yield "in_proj.weight", (rows, d_model)
    yield "out_proj.weight", (d_model, heads * d_head)
    if attn.get("qkv_proj_bias", True):
        yield "in_proj.bias", (rows,)
    if attn.get("out_proj_bias", True):
        yield "out_proj.bias", (d_model,)
    if attn.get("d_conv", 0):
        yield "conv1d.weight", (rows, 1, attn["d_conv"])
        yield "conv1d.bias", (rows,)


def _mamba_shapes(c: dict[str, Any]) -> Shapes:
    d_model, d_inner, state = c["d_model"], 2 * c["d_model"], c["ssm_cfg"]["d_state"]
    rank = math.ceil(d_model / 16)
    yield "in_proj.weight", (2 * d_inner, d_model)
    yield "conv1d.weight", (d_inner, 1, 4)
    yield "conv1d.bias", (d_inner,)
    yield "x_proj.weight", (rank + 2 * state, d_inner)
    yield "dt_proj.weight", (d_inner, rank)
    yield "dt_proj.bias", (d_inner,)
    yield "A_log", (d_inner, state)
    yield "D", (d_inner,)
    yield "out_proj.weight", (d_model, d_inner)


def _mamba2_shapes(c: dict[str, Any]) -> Shapes:
    d_model, d_inner, state = c["d_model"], 2 * c["d_model"], c["ssm_cfg"]["d_state"]
    heads, channels = d_inner // c["ssm_cfg"]["headdim"], d_inner + 2 * state
    yield "in_proj.weight", (d_inner + channels + heads, d_model)
    yield "conv1d.weight", (channels, 1, 4)
    yield "conv1d.bias", (channels,)
    for vector in ("dt_bias", "A_log", "D"):
        yield vector, (heads,)
    yield "norm.weight", (d_inner,)
    yield "out_proj.weight", (d_model, d_inner)


def logits(c: dict[str, Any], tensors: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits behind every id: (n,) -> (n, vocabulary) float64."""
    t = {name: values.astype(np.float64) for name, values in tensors.items()}
    h = t["backbone.embedding.weight"][ids]
    for i in range(c["n_layer"]):
        at = f"backbone.layers.{i}."
        mixer = {n.removeprefix(at + "mixer."): v for n, v in t.items() if n.startswith(at)}
        second = c["ssm_cfg"].get("layer") == "Mamba2"
        run = _attention if attends(c, i) else _mamba2 if second else _mamba
        h = h + run(c, mixer, _rms(h, t[at + "norm.weight"]))
        if c.get("d_intermediate"):
            x = _rms(h, t[at + "norm2.weight"]) @ t[at + "mlp.fc1.weight"].T
            y, gate = np.split(x, 2, axis=1)
            h = h + (y * _silu(gate)) @ t[at + "mlp.fc2.weight"].T
    return _rms(h, t["backbone.norm_f.weight"]) @ t["lm_head.weight"].T


def _rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * weight


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _conv(x: np.ndarray, t: dict[str, np.ndarray]) -> np.ndarray:
    """conv1d with zeros before the first token."""
    weight = t["conv1d.weight"][:, 0]
    rows = np.concatenate([np.zeros((weight.shape[1] - 1, x.shape[1])), x])
    taps = [rows[tap : tap + len(x)] * weight[:, tap] for tap in range(weight.shape[1])]
    return sum(taps) + t["conv1d.bias"]


def _attention(c: dict[str, Any], t: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    attn, n = c["attn_cfg"], len(x)
    heads = attn["num_heads"]
    key_heads = attn.get("num_heads_kv", heads)
    d_head = attn.get("head_dim", c["d_model"] // heads)
    qkv = x @ t["in_proj.weight"].T + t.get("in_proj.bias", 0)
    if attn.get("d_conv", 0):
        qkv = _conv(qkv, t)
    qkv = qkv.reshape(n, heads + 2 * key_heads, d_head)
    q, k, v = np.split(qkv, [heads, heads + key_heads], axis=1)
    if turned := attn.get("rotary_emb_dim", 0):
        q, k = (_turned(part, turned, attn.get("rotary_emb_base", 10000.0)) for part in (q, k))
    k, v = (np.repeat(part, heads // key_heads, axis=1) for part in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * attn.get("softmax_scale", d_head**-0.5)
    scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    y = np.einsum("hqk,khd->qhd", weights, v).reshape(n, -1)
    return y @ t["out_proj.weight"].T + t.get("out_proj.bias", 0)


def _turned(x: np.ndarray, count: int, base: float) -> np.ndarray:
    """flash_attn's RotaryEmbedding: pairs (i, i + count / 2) of the first `count` values."""
    half = count // 2
    angles = np.arange(len(x))[:, None, None] * base ** (-np.arange(half) / half)
    one, other = x[..., :half], x[..., half:count]
    turned = one * np.cos(angles) - other * np.sin(angles)
    turned_other = one * np.sin(angles) + other * np.cos(angles)
    return np.concatenate([turned, turned_other, x[..., count:]], axis=2)


def _mamba(c: dict[str, Any], t: dict[str, np.ndarray], u: np.ndarray) -> np.ndarray:
    d_state, rank = c["ssm_cfg"]["d_state"], math.ceil(c["d_model"] / 16)
    x, z = np.split(u @ t["in_proj.weight"].T, 2, axis=1)
    x = _silu(_conv(x, t))
    dt, b, c_ = np.split(x @ t["x_proj.weight"].T, [rank, rank + d_state], axis=1)
    dt = np.log1p(np.exp(dt @ t["dt_proj.weight"].T + t["dt_proj.bias"]))
    state, rows = np.zeros((x.shape[1], d_state)), []
    for i in range(len(u)):
        decay = np.exp(dt[i][:, None] * -np.exp(t["A_log"]))
        state = decay * state + (dt[i] * x[i])[:, None] * b[i]
        rows.append(state @ c_[i] + t["D"] * x[i])
    return (np.array(rows) * _silu(z)) @ t["out_proj.weight"].T


def _mamba2(c: dict[str, Any], t: dict[str, np.ndarray], u: np.ndarray) -> np.ndarray:
    d_inner, width, d_state = 2 * c["d_model"], c["ssm_cfg"]["headdim"], c["ssm_cfg"]["d_state"]
    cuts = [d_inner, 2 * d_inner + 2 * d_state]
    z, xbc, dt = np.split(u @ t["in_proj.weight"].T, cuts, axis=1)
    x, b, c_ = np.split(_silu(_conv(xbc, t)), [d_inner, d_inner + d_state], axis=1)
    dt, x = np.log1p(np.exp(dt + t["dt_bias"])), x.reshape(len(u), -1, width)
    state, rows = np.zeros((x.shape[1], width, d_state)), []
    for i in range(len(u)):
        decay = np.exp(dt[i] * -np.exp(t["A_log"]))[:, None, None]
        state = decay * state + (dt[i][:, None] * x[i])[..., None] * b[i]
        rows.append((state @ c_[i] + t["D"][:, None] * x[i]).reshape(-1))
    y = _rms(np.array(rows) * _silu(z), t["norm.weight"])
    return y @ t["out_proj.weight"].T
