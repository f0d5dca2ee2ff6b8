"""Running text through every row in lockstep: how the prediction of each token differs from the full cache's.

The second half of each window is scored, as upstream's llama-perplexity does; its last tokens are decoded one at a
time, and timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from depthkv_edge.evaluation.engine import Model
from depthkv_edge.evaluation.rows import Row
from depthkv_edge.evaluation.store import Record
from depthkv_edge.evaluation.stream import Occupancy, Stream

N_DECODE = 32  # tokens at the end of a window that are decoded one at a time
N_BINS = 64  # parts of the positions that occupancy is reported for
_CHUNK = 128  # tokens that each row is fed in turn


def run_window(
    model: Model, rows: Sequence[Row], tokens: Sequence[int], on_tokens: Callable[[int], None] = lambda n: None
) -> Record:
    """Feed one window to every row.

    Args:
        rows: FULL comes first.
        tokens: [n_ctx]
        on_tokens: called with the number of tokens that were computed since the last call.

    Returns:
        By row label: `kl` nats, `nll` nats, `top1` [n_scored] of the tokens scored; `prefill` seconds of each chunk of
        the n_prefill tokens before; `seconds` [N_DECODE] that each decoded token took; `seen` and `layers`, the cache
        at the end.
    """
    n_ctx = len(tokens)
    first, last = n_ctx // 2, n_ctx - min(N_DECODE, n_ctx // 8)
    with contextlib.ExitStack() as stack:
        lanes = [_Lane(stack.enter_context(row.open(model, n_ctx)), on_tokens) for row in rows]
        for part in _parts(tokens[:first], _CHUNK):
            for lane in lanes:
                lane.feed(part)
        scored = _parts(tokens[first:last], _CHUNK) + _parts(tokens[last:], 1)
        for part in scored:
            full = lanes[0].predict(part)
            n_fed = lanes[0].n_fed
            following = tokens[n_fed - len(part) + 1 : n_fed + 1]
            probability = np.exp(full)
            for lane in lanes:
                log_p = full if lane is lanes[0] else lane.predict(part)
                lane.score(full, probability, log_p, following)
                if n_fed > last:
                    lane.seconds.append(lane.stream.last_seconds)
        return {row.label: lane.to_record(n_ctx) for row, lane in zip(rows, lanes, strict=True)}


def _parts(tokens: Sequence[int], n: int) -> list[Sequence[int]]:
    return [tokens[at : at + n] for at in range(0, len(tokens), n)]


@dataclass
class _Lane:
    """One row, and what is known of it."""

    stream: Stream
    on_tokens: Callable[[int], None]
    n_fed: int = 0
    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    top1: list[int] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    n_prefill: int = 0
    seconds: list[float] = field(default_factory=list)

    def feed(self, tokens: Sequence[int]) -> None:
        self.stream.feed(tokens)
        self.prefill.append(self.stream.last_seconds)
        self.n_prefill += len(tokens)
        self._count(len(tokens))

    def predict(self, tokens: Sequence[int]) -> np.ndarray:
        log_p = self.stream.predict(tokens)
        self._count(len(tokens))
        return log_p

    def score(self, full: np.ndarray, probability: np.ndarray, log_p: np.ndarray, following: Sequence[int]) -> None:
        """Compare with the full cache's prediction. The last token of the text has none to follow, and no score.

        Args:
            full, probability: of the full cache, log-probabilities and their exponential [n, n_vocab].
            log_p: of this row.
            following: [n] tokens, or one fewer.
        """
        n = len(following)
        self.kl += (probability[:n] * (full[:n] - log_p[:n])).sum(axis=1, dtype=np.float64).tolist()
        self.nll += (-log_p[np.arange(n), np.array(following, int)]).astype(np.float64).tolist()
        self.top1 += (full[:n].argmax(axis=1) == log_p[:n].argmax(axis=1)).astype(int).tolist()

    def to_record(self, n_ctx: int) -> Record:
        scores = {"kl": self.kl, "nll": self.nll, "top1": self.top1}
        times = {"prefill": self.prefill, "n_prefill": self.n_prefill, "seconds": self.seconds}
        return scores | times | _occupancy(self.stream.occupancy(), n_ctx)

    def _count(self, n_tokens: int) -> None:
        self.n_fed += n_tokens
        self.on_tokens(n_tokens)


def _occupancy(occupancy: Occupancy, n_ctx: int) -> Record:
    shares = _shares(occupancy, n_ctx)
    layers = zip(occupancy.layers, occupancy.cells, occupancy.held, shares, strict=True)
    return {
        "seen": occupancy.n_seen,
        "layers": [
            {"layer": layer, "cells": cells, "held": held, "occupancy": share} for layer, cells, held, share in layers
        ],
    }


def _shares(occupancy: Occupancy, n_ctx: int) -> list[list[float]]:
    """Of each layer, the share of the tokens that it holds in each part of the positions, [n_layers][N_BINS]."""
    edges = np.linspace(0, n_ctx, min(N_BINS, n_ctx) + 1)
    sizes = np.histogram(np.arange(n_ctx), edges)[0]
    return [np.round(np.histogram(held, edges)[0] / sizes, 4).tolist() for held in occupancy.positions]
