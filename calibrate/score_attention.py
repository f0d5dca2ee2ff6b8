"""Attention by the L1 norm of the value: native/src/llama-kv-score-attention.cpp."""

from __future__ import annotations

import torch


def mass(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """See `scorers.Mass`."""
    return (weights.sum(dim=1) * value.abs().sum(dim=-1)).sum(dim=0)
