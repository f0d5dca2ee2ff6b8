"""Accumulated attention, decayed, over how many queries could have attended: native/src/llama-kv-score-attention.cpp.

s(c) = |V(c)|_1 * a(c) / n(c), with a and n as in docs/engine.md. The accumulation is that of H2O (arXiv 2306.14048).
"""

from __future__ import annotations

import numpy as np

from depthkv_edge.calibrate.scorer import Attention, Cells, Scorer

N_HALF_LIFE = 256.0  # tokens after which an observation counts half


def _accumulate(cells: Cells, attention: Attention, n_tokens: int) -> None:
    d = np.float32(0.5) ** np.float32(n_tokens / N_HALF_LIFE)
    n_seen = len(attention.pos) - np.searchsorted(attention.pos, cells.pos)
    cells.acc = d * cells.acc + attention.mass
    cells.cnt = d * cells.cnt + n_seen.astype(np.float32)


def _score(cells: Cells) -> np.ndarray:
    # a token that no query has judged yet is not to be evicted before one has
    judged = cells.cnt > 0
    return np.where(judged, cells.acc / np.where(judged, cells.cnt, 1), np.float32(np.inf))


ATTENTION = Scorer("attention", True, True, False, _accumulate, _score)
