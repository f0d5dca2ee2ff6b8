"""What a stock cache of fewer cells than the text has tokens does when it is full."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from depthkv_edge.engine.model import Cache, Model, api, decode, log_softmax, open_context
from depthkv_edge.engine.stream import Stream
from depthkv_edge.errors import DepthKVError


@dataclass
class _Bounded(Stream, ABC):
    """A stock cache of fewer cells than the text has tokens. What happens when it is full is `_make_room`'s."""

    def predict(self, tokens: Sequence[int]) -> np.ndarray:
        self.last_seconds = 0.0
        parts = [log_softmax(self._decode(part, len(part))) for part in self._parts(tokens)]
        return np.concatenate(parts)

    def feed(self, tokens: Sequence[int]) -> None:
        self.last_seconds = 0.0
        for part in self._parts(tokens):
            self._decode(part, 0)

    def _parts(self, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        done = 0
        while done < len(tokens):
            if self.n_used == self.n_cells:
                self._make_room()
            n = min(len(tokens) - done, self.n_cells - self.n_used, self.model.n_batch)
            yield tokens[done : done + n]
            done += n

    @abstractmethod
    def _make_room(self) -> None:
        """Free at least one cell."""

    def next_token(self, tokens: Sequence[int]) -> int:
        self.feed(tokens[:-1])
        if self.n_used == self.n_cells:
            self._make_room()
        return int(self._decode(tokens[-1:], 1)[0].argmax())


@dataclass
class ShiftStream(_Bounded):
    """llama.cpp's own context shift, with its server's defaults: drop half of the tokens, move the rest."""

    def _make_room(self) -> None:
        self.n_kept = len(self.model.bos)
        n_drop = max(1, (self.n_used - self.n_kept) // 2)
        memory = api.llama_get_memory(self.context)
        api.llama_memory_seq_rm(memory, 0, self.n_kept, self.n_kept + n_drop)
        api.llama_memory_seq_add(memory, 0, self.n_kept + n_drop, self.n_used, -n_drop)
        self.first += n_drop


@dataclass
class RereadStream(_Bounded):
    """A smaller window: when it is full, its younger half is read again from an empty cache."""

    def _make_room(self) -> None:
        kept = self.past[len(self.past) - max(1, self.n_cells // 2) :]
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        started = time.perf_counter()
        for start in range(0, len(kept), self.model.n_batch):
            decode(self.context, kept[start : start + self.model.n_batch], start)
        self.last_seconds += time.perf_counter() - started
        self.first = len(self.past) - len(kept)


STREAMS = {"evict": Stream, "shift": ShiftStream, "reread": RereadStream}


@contextlib.contextmanager
def open_stream(
    model: Model, n_ctx: int, cache: Cache, *, when_full: str = "evict", n_cells: int = 0
) -> Iterator[Stream]:
    """A stream in a context of its own.

    Args:
        n_ctx: tokens of the longest text.
        when_full: one of STREAMS.
        n_cells: of a stock cache that is smaller than the text.
    """
    n_cells = n_cells or n_ctx
    with open_context(model, n_cells, cache) as context:
        stream = STREAMS[when_full](model, context, n_cells)
        if when_full == "shift" and not api.llama_memory_can_shift(api.llama_get_memory(context)):
            raise DepthKVError("this model's cache cannot be shifted: leave context-shift out of --methods")
        yield stream
