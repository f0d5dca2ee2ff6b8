"""How often the most likely token is the full cache's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from depthkv_edge.quality.metrics.kl import WindowId
from depthkv_edge.quality.store import Record


def top1(windows: Mapping[WindowId, Record]) -> Record:
    """Share of all tokens of all windows."""
    same = np.concatenate([record["top1"] for record in windows.values()])
    return {"share": float(same.mean()), "n": len(same)}
