"""A control, a hash of layer and position: native/src/llama-kv-score-random.cpp."""

from __future__ import annotations

import numpy as np

from depthkv_edge.calibrate.scorer import Cells, Scorer, accumulate_nothing


def _score(cells: Cells) -> np.ndarray:
    # the finalizer of splitmix64
    with np.errstate(over="ignore"):
        x = np.uint64(cells.layer << 32) + cells.pos.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(40)).astype(np.float32) / np.float32(16777216)


RANDOM = Scorer("random", False, False, False, accumulate_nothing, _score)
