"""One window of text through the engine: what its end loses when a layer has forgotten, beside the full cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from depthkv_edge.calibrate.corpus import WindowTokens
from depthkv_edge.calibrate.layer_cells import LayerCells
from depthkv_edge.engine.model import Cache, Model, open_context
from depthkv_edge.engine.stream import Stream, StreamState

_ROWS = 32  # predictions that are compared at once: bounds what is held beside them


@dataclass(frozen=True)
class EngineWindow:
    """A window whose first tokens are in a cache with room for all of it, and the full cache's predictions of its tail.

    Attributes:
        model: the model.
        stream: over the cache.
        state: of the cache before the tail.
        past, tail: the tokens.
        rows: the predictions that count, by place in the tail.
        scorer: name of the token-scoring rule that chooses what is evicted.
        reference: log-probabilities [n, n_vocab] of the full cache, of the predictions that count.
        advance: told the number of tokens computed.
    """

    model: Model
    stream: Stream
    state: StreamState
    past: list[int]
    tail: list[int]
    rows: np.ndarray
    scorer: str
    reference: np.ndarray
    advance: Callable[[int], None]
    _held: dict[LayerCells, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    def lose(self, i: int, plan: LayerCells) -> float:
        """Mean KL divergence of the tail from the full cache, nats per token, when one layer has forgotten.

        What it has forgotten is what it would have, had every layer the cells of the plan. From there on nothing more
        is forgotten: all the difference to a layer that goes on evicting is in the tail.

        Args:
            i: of the layers that grow with the context.
        """
        if plan not in self._held:
            with _open_stream(self.model, self.past, self.tail, plan, self.scorer) as stream:
                _feed(stream, self.past, self.advance)
                self._held[plan] = stream.occupancy().positions
        return self._lose(i, self._held[plan][i])

    def noise(self, i: int, position: int) -> float:
        """The same when the layer has forgotten one token only: with quantised weights, what any change costs."""
        return self._lose(i, [p for p in range(len(self.past)) if p != position])

    def lose_all(self, plan: LayerCells) -> float:
        """The same when every layer has the cells of the plan, in the tail too."""
        with _open_stream(self.model, self.past, self.tail, plan, self.scorer) as stream:
            _feed(stream, self.past, self.advance)
            return self._divergence(stream)

    def _lose(self, i: int, positions: Sequence[int]) -> float:
        self.stream.restore(self.state)
        self.stream.keep(i, positions)
        return self._divergence(self.stream)

    def _divergence(self, stream: Stream) -> float:
        found = _predict(stream, self.tail, self.rows, self.advance)
        total = 0.0
        for at in range(0, len(found), _ROWS):
            full, pruned = self.reference[at : at + _ROWS], found[at : at + _ROWS]
            total += float((np.exp(full) * (full - pruned)).sum(dtype=np.float64))
        return total / len(found)


@contextmanager
def open_engine_window(
    model: Model, window: WindowTokens, n_tail: int, scorer: str, advance: Callable[[int], None] = lambda n: None
) -> Iterator[EngineWindow]:
    """Run a window with full caches.

    Args:
        n_tail: the last tokens of a window that asks for nothing; one that asks has its own tail.
        advance: told the number of tokens computed.

    Raises:
        DepthKVError: the engine refuses the model.
    """
    n_past = len(window.tokens) - (window.n_tail or n_tail)
    past, tail = list(window.tokens[:n_past]), list(window.tokens[n_past:])
    rows = np.array([at - 1 - n_past for at in window.asked] if window.asked else range(len(tail)), int)
    full = LayerCells((len(window.tokens),) * model.n_layers)
    with _open_stream(model, past, tail, full, scorer) as stream:
        _feed(stream, past, advance)
        state = stream.save()
        reference = _predict(stream, tail, rows, advance)
        yield EngineWindow(model, stream, state, past, tail, rows, scorer, reference, advance)


@contextmanager
def _open_stream(
    model: Model, past: Sequence[int], tail: Sequence[int], plan: LayerCells, scorer: str
) -> Iterator[Stream]:
    n_ctx = len(past) + len(tail)
    with open_context(model, n_ctx, Cache(scorer=scorer, cells=plan.cells)) as context:
        yield Stream(model, context, n_ctx)


def _feed(stream: Stream, tokens: Sequence[int], advance: Callable[[int], None]) -> None:
    n_batch = stream.model.n_batch
    for at in range(0, len(tokens), n_batch):
        part = tokens[at : at + n_batch]
        stream.feed(part)
        advance(len(part))


def _predict(stream: Stream, tail: Sequence[int], rows: np.ndarray, advance: Callable[[int], None]) -> np.ndarray:
    """Feed the tail; log-probabilities [n, n_vocab] of its rows."""
    n_batch = stream.model.n_batch
    found = []
    for at in range(0, len(tail), n_batch):
        part = tail[at : at + n_batch]
        found.append(stream.predict(part)[rows[(rows >= at) & (rows < at + len(part))] - at])
        advance(len(part))
    return np.concatenate(found)
