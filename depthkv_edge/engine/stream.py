"""A text running through one context: fed, predicted, saved and restored."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depthkv_edge.engine import capi
from depthkv_edge.engine.model import Model, api, decode, log_softmax
from depthkv_edge.engine.stats import read_stats
from depthkv_edge.errors import DepthKVError, Stopped


@dataclass(frozen=True)
class Occupancy:
    """What a stream's KV cache holds, layer by layer (those that grow with the context).

    Attributes:
        n_seen: tokens fed.
        layers: index of each layer in the model.
        cells: of each layer.
        held: tokens that each layer holds.
        positions: places in the text of the tokens that each layer holds, ascending.
    """

    n_seen: int
    layers: tuple[int, ...]
    cells: tuple[int, ...]
    held: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class StreamState:
    """What `Stream.save` leaves: it stays valid for as long as the stream."""

    data: np.ndarray
    past: tuple[int, ...]
    first: int
    n_kept: int


@dataclass
class Stream:
    """One sequence in a context whose cache takes every token: full, quantised, or evicting by itself.

    Attributes:
        model: the model.
        context: its llama_context.
        n_cells: tokens that a stock cache holds before something must happen.
        past: every token fed since the stream was empty, forgotten ones too.
        first: place in the text of the oldest token after the n_kept ones that the stock cache still holds.
        n_kept: tokens at the front of the text that a position shift keeps.
        last_seconds: time that the last `feed` or `predict` spent in the engine.
    """

    model: Model
    context: Any
    n_cells: int
    past: list[int] = field(default_factory=list)
    first: int = 0
    n_kept: int = 0
    last_seconds: float = 0.0

    def feed(self, tokens: Sequence[int]) -> None:
        """Prefill tokens, a batch at a time."""
        self.last_seconds = 0.0
        for start in range(0, len(tokens), self.model.n_batch):
            self._decode(tokens[start : start + self.model.n_batch], 0)

    def predict(self, tokens: Sequence[int]) -> np.ndarray:
        """Feed tokens, no more than fit a batch; log-probabilities [n, n_vocab] of what follows each."""
        self.last_seconds = 0.0
        return log_softmax(self._decode(tokens, len(tokens)))

    def next_token(self, tokens: Sequence[int]) -> int:
        """Feed tokens; the most likely one to follow."""
        self.feed(tokens[:-1])
        return int(self._decode(tokens[-1:], 1)[0].argmax())

    def clear(self) -> None:
        """Empty the cache, pins included."""
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        self.past.clear()
        self.first = 0

    def pin(self, p0: int, p1: int) -> None:
        """Never evict the tokens at [p0, p1). Nothing to do in a stock cache."""
        if self.stats().active and not capi.llama_depthkv_pin(self.context, 0, p0, p1):
            raise DepthKVError(capi.last_error())

    def save(self) -> StreamState:
        """The state of the sequence, what was evicted and pinned included."""
        data = np.empty(api.llama_state_seq_get_size(self.context, 0), np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if api.llama_state_seq_get_data(self.context, pointer, len(data), 0) == 0:
            raise RuntimeError("the state of the context cannot be saved")
        return StreamState(data, tuple(self.past), self.first, self.n_kept)

    def restore(self, state: StreamState) -> None:
        """Go back to a saved state."""
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        pointer = state.data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if api.llama_state_seq_set_data(self.context, pointer, len(state.data), 0) == 0:
            raise RuntimeError("the state of the context cannot be restored")
        self.past, self.first, self.n_kept = list(state.past), state.first, state.n_kept

    def keep(self, i: int, positions: Sequence[int]) -> None:
        """Evict what layer i (of those that grow with the context) holds but for some positions and the last one.

        Raises:
            DepthKVError: the cache is a stock one.
        """
        data = (api.llama_pos * len(positions))(*positions)
        if not capi.llama_depthkv_seq_keep(self.context, i, 0, data, len(positions)):
            raise DepthKVError(capi.last_error())

    def stats(self) -> Any:
        """See `depthkv_edge.engine.stats.KVStats`; of the allocated cache."""
        return read_stats(self.context)

    def occupancy(self) -> Occupancy:
        stats = self.stats()
        positions = tuple(self._positions(i) for i in range(len(stats.layers)))
        return Occupancy(
            n_seen=len(self.past),
            layers=tuple(layer.layer for layer in stats.layers),
            cells=tuple(layer.cells if stats.active else self.n_cells for layer in stats.layers),
            held=tuple(len(p) for p in positions),
            positions=positions,
        )

    def _positions(self, i: int) -> tuple[int, ...]:
        n = max(1, len(self.past))
        buffer = (api.llama_pos * n)()
        held = capi.llama_depthkv_get_positions(self.context, i, 0, buffer, n)
        # what a smaller window dropped has moved the positions of the others
        return tuple(pos if pos < self.n_kept else pos + self.first for pos in buffer[:held])

    @property
    def n_used(self) -> int:
        """Tokens in a stock cache; the position of the next one."""
        return len(self.past) - self.first

    def _decode(self, tokens: Sequence[int], n_outputs: int) -> np.ndarray:
        if self.model.stopping.is_set():
            raise Stopped
        started = time.perf_counter()
        logits = decode(self.context, tokens, self.n_used, n_outputs=n_outputs)
        self.last_seconds += time.perf_counter() - started
        self.past += tokens
        return logits
