"""Attention given by the latest queries only, after SnapKV (arXiv 2404.14469): native/src/llama-kv-score-window.cpp.

Not faithful to the paper in what the engine is not: one choice for all heads, repeated whenever the layer must evict.
"""

from __future__ import annotations

import numpy as np

from depthkv_edge.calibrate.scorer import Attention, Cells, Scorer

N_POOL = 3  # neighbours on each side that an important token keeps with it


def _accumulate(cells: Cells, attention: Attention, n_tokens: int) -> None:
    cells.acc = attention.mass


def _score(cells: Cells) -> np.ndarray:
    p0 = cells.pos[0]
    by_pos = np.zeros(cells.pos[-1] + 1 - p0 + 2 * N_POOL, np.float32)
    by_pos[cells.pos - p0 + N_POOL] = np.nan_to_num(cells.acc, nan=0.0)  # std::max() passes over what is not a number
    pooled = np.lib.stride_tricks.sliding_window_view(by_pos, 2 * N_POOL + 1).max(axis=1)
    return pooled[cells.pos - p0]


WINDOW = Scorer("window", True, False, True, _accumulate, _score)
