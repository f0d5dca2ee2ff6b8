"""Speed against the full cache's."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from depthkv_edge.quality.metrics.kl import WindowId
from depthkv_edge.quality.store import Record


def compare_speed(
    seconds: Mapping[WindowId, float], reference: Mapping[WindowId, float], n_tokens: Mapping[WindowId, int]
) -> Record:
    """Median over the windows; n of them.

    Args:
        seconds: that each window took.
        reference: that it took the full cache.
        n_tokens: that were computed in that time.

    Returns:
        tokens_per_second; ratio to the full cache's of the same window, the smallest in `low`, the largest in `high`.
    """
    ratios = [reference[key] / seconds[key] for key in seconds]
    return {
        "tokens_per_second": median(n_tokens[key] / seconds[key] for key in seconds),
        "ratio": median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "n": len(ratios),
    }
