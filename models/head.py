"""The end that all architectures share: a norm and the output matrix, for the rows asked for."""

from __future__ import annotations

from typing import Any

from .graph import Graph, Value


def logits(g: Graph, h: Value, w: Any, eps: float, scale: float = 1.0, norm: Any = None) -> Value:
    """Logits (R, vocabulary) of the residual stream h: (T, D).

    A file without `output.weight` uses the embedding twice. `scale` multiplies the logits. `norm`:
    the norm's weight, where that is not `output_norm`.
    """
    embedding = w.token_embd.tensor()
    h = g.rms_norm(g.select(h), norm or w.output_norm, eps=eps)
    if scale != 1.0:
        # Before the matrix: as good, and narrower than the vocabulary.
        h = g.scaled(h, scale=scale)
    return g.linear(h, w.output.find() or embedding, width=embedding.shape[0])
