"""Which tokens of a text one layer holds, by the code of the engine and without a model."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthkv_edge.engine import capi
from depthkv_edge.engine.rules import N_RECENT, N_SINK
from depthkv_edge.errors import DepthKVError

AttentionOf = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(pos of queries [n_queries], pos of held cells [n]) -> what the scorer makes of their attention, float32 [n]."""


@dataclass(frozen=True)
class Held:
    """The cells of one layer when a ubatch runs, besides those of the ubatch itself.

    Attributes:
        start: position of the first token of the ubatch.
        pos: int64 [n] held positions, all before `start`, ascending.
    """

    start: int
    pos: np.ndarray


class LayerSim:
    """One layer that a text passes through; see the simulation in native/include/llama-depthkv.h.

    Args:
        scorer: name of a token-scoring rule.
        layer: layer index in the model.
        n_cells: capacity.

    Raises:
        DepthKVError: the rule is unknown, or there is no room beside sinks and recent tokens.
    """

    def __init__(self, scorer: str, layer: int, n_cells: int):
        self._sim = capi.llama_depthkv_sim_init(scorer.encode(), layer, n_cells, N_SINK, N_RECENT)
        if not self._sim:
            raise DepthKVError(capi.last_error())
        self._n_max = n_cells
        weakref.finalize(self, capi.llama_depthkv_sim_free, self._sim)

    @property
    def pos(self) -> np.ndarray:
        """int64 [n] positions that it holds, ascending."""
        return self._read(capi.llama_depthkv_sim_positions)

    def due(self, n_tokens: int) -> np.ndarray:
        """int64 [n] positions of the queries that are counted before so many tokens come."""
        return self._read(capi.llama_depthkv_sim_queries, n_tokens)

    def pending(self) -> np.ndarray:
        """int64 [n] positions of all queries that have not been counted yet."""
        return self._read(capi.llama_depthkv_sim_pending)

    def count(self, mass: np.ndarray) -> None:
        """Count the pending queries.

        Args:
            mass: float32 [n], by held position.
        """
        data = np.ascontiguousarray(mass, np.float32)
        if data.shape != self.pos.shape:
            raise ValueError(f"attention of {data.shape} to {self.pos.shape} cells")
        capi.llama_depthkv_sim_count(self._sim, data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))

    def evict(self, n_tokens: int) -> None:
        """Make room for so many tokens."""
        capi.llama_depthkv_sim_evict(self._sim, n_tokens)

    def add(self, n_tokens: int) -> None:
        """The next tokens of the text, for which there is room."""
        capi.llama_depthkv_sim_add(self._sim, n_tokens)

    def _read(self, function: Callable[..., int], *arguments: Any) -> np.ndarray:
        found = np.empty(max(self._n_max, 64), np.int32)
        n = function(self._sim, *arguments, found.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), found.size)
        return found[:n].astype(np.int64)


def sampled_queries(scorer: str, n_tokens: int, ubatch: int) -> list[np.ndarray]:
    """Positions of the queries that the engine samples from each ubatch of a text of `n_tokens`."""
    return [start + _sample(scorer, min(ubatch, n_tokens - start)) for start in range(0, n_tokens, ubatch)]


def _sample(scorer: str, n_tokens: int) -> np.ndarray:
    found = np.empty(n_tokens, np.uint32)
    pointer = found.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
    n = capi.llama_depthkv_sim_sample(scorer.encode(), n_tokens, pointer, found.size)
    if n < 0:
        raise DepthKVError(capi.last_error())
    return found[:n].astype(np.int64)


def simulate(
    scorer: str, layer: int, n_tokens: int, n_cells: int, ubatch: int, attention_of: AttentionOf, first: int = 0
) -> list[Held]:
    """Feed a text to a layer of `n_cells` cells, a ubatch at a time.

    Args:
        scorer: name of a token-scoring rule.
        layer: layer index in the model.
        ubatch: tokens of a ubatch; `rules.n_ubatch` of the smallest layer.
        attention_of: attention of queries to held cells; called only if the scorer needs attention.
        first: the ubatches that end before this position are left out of the answer.

    Returns:
        One entry for each ubatch.
    """
    sim = LayerSim(scorer, layer, n_cells)
    held = []
    for start in range(0, n_tokens, ubatch):
        n = min(ubatch, n_tokens - start)
        queries = sim.due(n)
        if len(queries):
            sim.count(attention_of(queries, sim.pos))
        sim.evict(n)
        if start + n > first:
            held.append(Held(start, sim.pos))
        sim.add(n)
    return held
