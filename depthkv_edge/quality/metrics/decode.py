"""Decode speed at the end of a window: a row and the full cache decode its tokens in turns."""

from __future__ import annotations

from collections.abc import Mapping

from depthkv_edge.quality.metrics.kl import WindowId
from depthkv_edge.quality.metrics.rate import compare_speed
from depthkv_edge.quality.store import Record


def decode_speed(windows: Mapping[WindowId, Record]) -> Record:
    """See `compare_speed`."""
    names = "seconds", "seconds_full"
    seconds, stock = ({key: sum(record[name]) for key, record in windows.items()} for name in names)
    return compare_speed(seconds, stock, {key: len(record["seconds"]) for key, record in windows.items()})
