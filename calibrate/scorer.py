"""What a token-scoring rule is, as in native/src/llama-kv-score.h. One rule, one file: `score_*.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass
class Cells:
    """The KV cells that one layer holds, and what its scorer has accumulated for them.

    Attributes:
        layer: layer index in the model.
        pos: int64 [n] positions, ascending.
        acc: float32 [n] accumulated attention, 0 for a new token.
        cnt: float32 [n] accumulated number of queries, 0 for a new token.
    """

    layer: int
    pos: np.ndarray
    acc: np.ndarray
    cnt: np.ndarray


@dataclass(frozen=True)
class Attention:
    """Attention that the sampled queries give to the held cells of a layer.

    Attributes:
        mass: float32 [n] summed over heads and queries, times the L1 norm of the value if the scorer asks for it.
        pos: int64 [n_queries] positions of the queries, ascending.
    """

    mass: np.ndarray
    pos: np.ndarray


def accumulate_nothing(cells: Cells, attention: Attention, n_tokens: int) -> None:
    """For the rules that need no attention."""


@dataclass(frozen=True)
class Scorer:
    """A token-scoring rule: the cells with the lowest scores are evicted first.

    Attributes:
        needs_attn: without it, scoring needs no attention and `accumulate` is never called.
        weights_value: weight the attention by the L1 norm of the value.
        samples_last: sample the last queries of a ubatch, not some that are spread over it.
        accumulate: add what the sampled queries say to the cells, given the tokens seen since the last time.
        score: float32 [n] scores of the cells.
    """

    name: str
    needs_attn: bool
    weights_value: bool
    samples_last: bool
    accumulate: Callable[[Cells, Attention, int], None]
    score: Callable[[Cells], np.ndarray]
