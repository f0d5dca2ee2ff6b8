"""Decode speed at the end of a window: tokens of all rows are decoded in turn."""

from __future__ import annotations

from collections.abc import Mapping

from depthkv_edge.evaluation.metrics.kl import WindowId
from depthkv_edge.evaluation.metrics.speed import compare_speed
from depthkv_edge.evaluation.store import Record


def decode_speed(windows: Mapping[WindowId, Record], reference: Mapping[WindowId, Record]) -> Record:
    """See `compare_speed`."""
    seconds, stock = ({key: sum(record["seconds"]) for key, record in of.items()} for of in (windows, reference))
    return compare_speed(seconds, stock, {key: len(record["seconds"]) for key, record in windows.items()})
