"""Mean KL divergence of a row's predictions from the full cache's, in nats per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from depthkv_edge.quality.metrics.interval import interval
from depthkv_edge.quality.store import Record

WindowId = tuple[int, int]  # of the text, and of the window in it

_BLOCK = 64  # tokens: the loss of neighbours goes together, so blocks are drawn and not tokens


def kl(windows: Mapping[WindowId, Record], titles: Sequence[str]) -> Record:
    """Mean over all tokens, and by text.

    Args:
        windows: see `depthkv_edge.quality.language.Window.measure`.
        titles: of the texts.

    Returns:
        mean; low, high: its 95 % bootstrap interval over blocks of 64 tokens, which says nothing of other texts;
        n tokens; by_text.
    """
    tokens = [np.array(record["kl"]) for record in windows.values()]
    blocks = [np.mean(part) for window in tokens for part in np.array_split(window, max(1, len(window) // _BLOCK))]
    low, high = interval(blocks)
    by_text: dict[str, list[float]] = {}
    for (text, _), record in windows.items():
        by_text.setdefault(titles[text], []).extend(record["kl"])
    return {
        "mean": float(np.mean(np.concatenate(tokens))),
        "low": low,
        "high": high,
        "n": sum(map(len, tokens)),
        "by_text": {title: float(np.mean(values)) for title, values in by_text.items()},
    }
