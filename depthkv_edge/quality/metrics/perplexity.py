"""Perplexity of the text, against the full cache's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from depthkv_edge.quality.metrics.kl import WindowId
from depthkv_edge.quality.store import Record


def perplexity(windows: Mapping[WindowId, Record], reference: Mapping[WindowId, Record]) -> Record:
    """Over all tokens of all windows.

    Returns:
        ratio to the full cache's, and the full cache's own in `full`; n tokens.
    """
    nll = np.concatenate([record["nll"] for record in windows.values()])
    full = np.concatenate([record["nll"] for record in reference.values()])
    return {"ratio": math.exp(nll.mean() - full.mean()), "full": math.exp(full.mean()), "n": len(nll)}
