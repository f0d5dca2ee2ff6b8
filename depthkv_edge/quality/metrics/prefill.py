"""Prefill speed over the first half of a window, which is not scored.

Rows run one after another, so that the ratio holds the machine's moods; `depthkv-edge bench` takes turns.
"""

from __future__ import annotations

from collections.abc import Mapping

from depthkv_edge.quality.metrics.kl import WindowId
from depthkv_edge.quality.metrics.rate import compare_speed
from depthkv_edge.quality.store import Record


def prefill_speed(windows: Mapping[WindowId, Record]) -> Record:
    """See `compare_speed`. What a row does to make room is part of its time."""
    names = "prefill", "prefill_full"
    seconds, stock = ({key: sum(record[name]) for key, record in windows.items()} for name in names)
    return compare_speed(seconds, stock, {key: record["n_prefill"] for key, record in windows.items()})
