"""Sinks and recency, StreamingLLM (arXiv 2309.17453): native/src/llama-kv-score-streaming.cpp."""

from __future__ import annotations

import numpy as np

from depthkv_edge.calibrate.scorer import Cells, Scorer, accumulate_nothing


def _score(cells: Cells) -> np.ndarray:
    # the older token goes first among equals
    return np.zeros(len(cells.pos), np.float32)


STREAMING = Scorer("streaming", False, False, False, accumulate_nothing, _score)
