"""Which KV cells one layer holds at every ubatch of a text: eviction by the very rules of the engine.

After llama_kv_cache_depth::apply_ubatch() and evict() in native/src/llama-kv-cache-depth.cpp, llama_kv_score_select()
in llama-kv-score.cpp and llama_kv_depth_n_ubatch() in llama-kv-depth-params.cpp, for one sequence without pins. Names
of constants are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from depthkv_edge.calibrate.scorer import Attention, Cells, Scorer

N_QUERY = 32  # sampled queries that are kept
N_QUERY_SPAN_PP = 128  # tokens that they cover, of a prompt
N_QUERY_SPAN_TG = 512  # .. of a text that arrives a token at a time
N_WARMUP = 512  # tokens before its first eviction that a layer counts attention
N_EVICT_BATCH = 64  # cells freed at once, when fewer are needed
N_SINK = 4
N_RECENT = 32
N_UBATCH_MIN = 32
N_UBATCH = 512  # of a context, unless the user asks for another
N_ALIGN = 32  # granularity of a layer on a CPU

# smallest layer that can evict: what is never evicted, and a ubatch
N_CELLS_MIN = N_SINK + N_RECENT + N_UBATCH_MIN

AttentionOf = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(pos of queries [n_queries], pos of held cells [n]) -> attention mass, float32 [n]."""


@dataclass(frozen=True)
class Held:
    """The cells of one layer when a ubatch runs, besides those of the ubatch itself.

    Attributes:
        start: position of the first token of the ubatch.
        pos: int64 [n] held positions, all before `start`, ascending.
    """

    start: int
    pos: np.ndarray


def n_ubatch(n_cells_min: int) -> int:
    """Tokens of a ubatch, from the cells of the smallest layer."""
    return min(max(N_UBATCH_MIN, n_cells_min // 12 // 32 * 32), N_UBATCH, n_cells_min - N_SINK - N_RECENT)


def aligned(n_cells: int) -> int:
    """Cells that the engine makes of so many that are asked for."""
    return -(-n_cells // N_ALIGN) * N_ALIGN


def sampled_queries(scorer: Scorer, n_tokens: int, ubatch: int) -> list[np.ndarray]:
    """Positions of the queries that the engine samples from each ubatch of a text of `n_tokens`."""
    n_skip = N_QUERY_SPAN_PP // N_QUERY
    sampled = []
    for start in range(0, n_tokens, ubatch):
        n = min(ubatch, n_tokens - start)
        n_q = min(N_QUERY, (n + n_skip - 1) // n_skip)
        i = np.arange(n_q)
        # the last token is always one of them: every token of the ubatch is seen by a query
        sampled.append(start + (n - n_q + i if scorer.samples_last else (i + 1) * n // n_q - 1))
    return sampled


def simulate(
    scorer: Scorer, layer: int, n_tokens: int, n_cells: int, ubatch: int, attention_of: AttentionOf, first: int = 0
) -> list[Held]:
    """Feed a text to a layer of `n_cells` cells, a ubatch at a time.

    Args:
        layer: layer index in the model.
        ubatch: tokens of a ubatch; `n_ubatch` of the smallest layer.
        attention_of: attention of queries to held cells; called only if the scorer needs attention.
        first: the ubatches that end before this position are left out of the answer.

    Returns:
        One entry for each ubatch.
    """
    cells = Cells(layer, np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32))
    sampled = sampled_queries(scorer, n_tokens, ubatch)
    ring = np.empty(0, np.int64)
    pos_scored = -1
    held = []
    for queries, start in zip(sampled, range(0, n_tokens, ubatch), strict=True):
        n = min(ubatch, n_tokens - start)
        n_free = n_cells - len(cells.pos)
        if scorer.needs_attn and n_free < n + (N_WARMUP if n > 1 else 0):
            n_span = N_QUERY_SPAN_PP if n > 1 else N_QUERY_SPAN_TG
            new = ring[ring > pos_scored]
            if len(new) and (start - 1 - pos_scored >= n_span or (n_free < n and pos_scored < 0)):
                scorer.accumulate(
                    cells, Attention(attention_of(new, cells.pos), new), int(new[-1]) - max(pos_scored, 0)
                )
                pos_scored = int(new[-1])
        if n_free < n:
            evict(cells, scorer, max(n - n_free, min(N_EVICT_BATCH, n_cells // 32)))
        if start + n > first:
            held.append(Held(start, cells.pos))
        _add(cells, start, n)
        ring = np.concatenate([ring, queries])[-N_QUERY:]
    return held


def evict(cells: Cells, scorer: Scorer, n_evict: int) -> None:
    """Free the cells of lowest score outside sinks and recent tokens."""
    scores = scorer.score(cells)
    # a broken key or value must not break the order of the others
    scores = np.where(np.isnan(scores), np.float32(-np.inf), scores)
    evictable = np.flatnonzero((cells.pos >= N_SINK) & (cells.pos < cells.pos[-1] + 1 - N_RECENT))
    # positions ascend, so a stable order frees the older token first among equals
    lowest = evictable[np.argsort(scores[evictable], kind="stable")[:n_evict]]
    for name in ("pos", "acc", "cnt"):
        setattr(cells, name, np.delete(getattr(cells, name), lowest))


def _add(cells: Cells, start: int, n: int) -> None:
    cells.pos = np.concatenate([cells.pos, np.arange(start, start + n)])
    cells.acc = np.concatenate([cells.acc, np.zeros(n, np.float32)])
    cells.cnt = np.concatenate([cells.cnt, np.zeros(n, np.float32)])
