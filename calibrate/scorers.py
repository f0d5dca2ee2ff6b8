"""What token-scoring rules make of attention before the engine counts it: one file for each that differs from the sum.

The rest of a rule, what it counts and how it scores, is the engine's own code: `engine.sim`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from depthkv_edge.calibrate import score_attention

Mass = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(attention [n_heads_kv, n_group * n_queries, n], values [n_heads_kv, n, head_size]) -> float32 [n]."""


def _summed(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Over queries and heads: llama_kv_score_i::build() in native/src/llama-kv-score.cpp."""
    return weights.sum(dim=1).sum(dim=0)


_MASS: dict[str, Mass] = {"attention": score_attention.mass}


def mass_of(scorer: str) -> Mass:
    """By the name of the rule in the engine."""
    return _MASS.get(scorer, _summed)
