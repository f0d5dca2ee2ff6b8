"""Decode speed at the end of a window, against the full cache: tokens of all rows are decoded in turn."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from depthkv_edge.evaluation.metrics.kl import WindowId
from depthkv_edge.evaluation.store import Record


def decode_speed(windows: Mapping[WindowId, Record], reference: Mapping[WindowId, Record]) -> Record:
    """Median over the windows; n of them.

    Returns:
        tokens_per_second; ratio to the full cache's of the same window, the smallest in `low`, the largest in `high`.
    """
    seconds = {key: sum(record["seconds"]) for key, record in windows.items()}
    ratios = [sum(reference[key]["seconds"]) / total for key, total in seconds.items()]
    speeds = [len(windows[key]["seconds"]) / total for key, total in seconds.items()]
    return {
        "tokens_per_second": median(speeds),
        "ratio": median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "n": len(ratios),
    }
