"""A small hybrid from seeded weights: attention over pages, a convolution, and experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness import Tensors
from keelback.kernels.formats.blocks import F16, F32, BlockFormat
from keelback.models.blocks import attend
from keelback.models.graph import Graph

WIDTH, HEADS, EXPERTS, USED, LAYERS, TAPS, VOCABULARY = 72, 3, 6, 2, 2, 3, 37
#: The expert that the router never picks: its weights are NaN.
SHUNNED = 4
#: Experts whose scores are always the same number.
TIED = (1, 2)


class HybridWeights(Tensors):
    """Seeded weights by name."""

    def matrix(self, name: str, *shape: int, block: BlockFormat = F32) -> Any:
        rng = np.random.default_rng(len(self.tensors))
        values = rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
        return self.add(name, values, block)

    def router(self, name: str) -> tuple[Any, Any]:
        rng = np.random.default_rng(len(self.tensors))
        weight = rng.standard_normal((EXPERTS, WIDTH), np.float32)
        bias = rng.standard_normal(EXPERTS, np.float32)
        weight[list(TIED)], bias[list(TIED)] = 0, 0.5
        weight[SHUNNED], bias[SHUNNED] = 0, -1e9
        return self.add(f"{name}.weight", weight), self.add(f"{name}.bias", bias)

    def experts(self, name: str) -> Any:
        rng = np.random.default_rng(len(self.tensors))
        values = rng.standard_normal((EXPERTS, WIDTH, WIDTH), np.float32) / np.float32(WIDTH**0.5)
        values[SHUNNED] = np.nan
        return self.add(name, values)


def hybrid() -> tuple[Graph, Tensors]:
    """Two layers of attention over pages, a convolution with a state, and experts."""
    g, w = Graph(), HybridWeights()
    ones = np.ones(WIDTH, np.float32)
    h = g.embedding(w.matrix("embedding", VOCABULARY, WIDTH), width=WIDTH)
    for i in range(LAYERS):
        x = g.rms_norm(h, w.add(f"{i}.norm", ones), eps=1e-5)
        qkv = g.linear(x, w.matrix(f"{i}.qkv", 3 * WIDTH, WIDTH, block=F16), width=3 * WIDTH)
        q, k, v = g.split(qkv, WIDTH, WIDTH, WIDTH)
        scale = (WIDTH / HEADS) ** -0.5
        o = attend(g, i, q, k, v, heads=HEADS, key_heads=HEADS, scale=scale)
        h = g.add(h, g.linear(o, w.matrix(f"{i}.out", WIDTH, WIDTH, block=F16), width=WIDTH))
        window = g.state(f"{i}.conv", TAPS - 1, WIDTH)
        c = g.causal_conv(h, window, w.matrix(f"{i}.conv", WIDTH, TAPS), taps=TAPS, silu=1)
        x = g.rms_norm(g.add(h, c), w.add(f"{i}.ffn_norm", ones), eps=1e-5)
        routes = g.route(g.linear(x, *w.router(f"{i}.router"), width=EXPERTS), used=USED)
        sizes = {"width": WIDTH, "used": USED, "experts": EXPERTS}
        up = g.expert_linear(x, routes, w.experts(f"{i}.up"), **sizes)
        down = g.expert_linear(g.silu(up), routes, w.experts(f"{i}.down"), parts=USED, **sizes)
        h = g.add(h, g.expert_sum(down, routes, used=USED))
    h = g.rms_norm(g.select(h), w.add("norm", ones), eps=1e-5)
    g.finish(g.linear(h, w.matrix("head", VOCABULARY, WIDTH), width=VOCABULARY))
    return g, w
