"""KL divergence between two sets of logits that are nearly the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_LARGE = 20.0


def divergence(full: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """KL(full || pruned) of each row, in nats, float32 [n].

    With d the difference of the logits and d' = d - E_full[d], it is log E_full[exp d']. Computed so, what rounding
    leaves is far below the divergence even where that is 1e-6; the textbook sum cancels to noise there.

    What is not finite, in either of them, makes the row NaN; but for -inf in `full`, a token that the model rules out.

    Args:
        full, pruned: logits [n, n_vocab].
    """
    full = full.float()
    log_p = full - full.logsumexp(dim=-1, keepdim=True)
    d = pruned.float() - full
    d = d.masked_fill(full == -torch.inf, 0.0)  # a token that the model rules out
    p = log_p.exp()
    d = d - (p * d).sum(dim=-1, keepdim=True)
    small = (p * (d.clamp(max=_LARGE).expm1() - d)).sum(dim=-1).log1p()
    large = d.amax(dim=-1) > _LARGE  # the exponential of what a pruned model is sure of may overflow
    if large.any():
        small[large] = (log_p + d)[large].logsumexp(dim=-1)
    return small.clamp(min=0)


def mean_divergence(chunks: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean over the rows of all chunks (full, pruned), nats per token."""
    total, n = 0.0, 0
    for full, pruned in chunks:
        total += float(divergence(full, pruned).cpu().double().sum())
        n += len(full)
    return total / n
