"""Ling 3.0: Kimi Linear's layers, with decays that have a lower bound and attention that is gated.

Source: the model `bailing_hybrid` of transformers. Unlike Kimi's, its attention is told positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernels.errors import UnsupportedModel
from ..kernels.rotary import neighbours
from . import kimi_linear
from .graph import Graph, Value
from .hyperparameters import Hyperparameters
from .rope import rotate

ARCHITECTURE = "bailingmoe3"


def build(g: Graph, p: Hyperparameters, w: Any) -> Value:
    """Return the logits of the rows that were asked for: (R, vocabulary)."""
    for key in ("rope.dimension_sections", "swiglu_clamp_exp", "swiglu_clamp_shexp"):
        # Limits of 0 are none.
        if np.any(p.metadata.get(f"{ARCHITECTURE}.{key}", 0)):
            raise UnsupportedModel(
                f"{p.path} has values under {ARCHITECTURE}.{key}; keelback runs Ling 3.0 without"
            )

    def turn(x: Value, heads: int) -> Value:
        return rotate(g, p, w, x, heads=heads, count=x.width // heads, pairs=neighbours)

    return kimi_linear.trunk(g, p, w, safe=True, turn=turn)
