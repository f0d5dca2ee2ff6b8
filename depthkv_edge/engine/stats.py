"""What a context's KV cache holds."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from depthkv_edge.engine import capi
from depthkv_edge.errors import DepthKVError


@dataclass(frozen=True)
class LayerStats:
    """One layer whose cells grow with the context.

    Attributes:
        layer: index in the model.
        cells: KV cells of one sequence.
        used: cells that hold a token of the sequence.
        evicted: tokens of the sequence that were evicted since the layer last held all of it.
        bytes: K and V of all sequences.
        sinks, pinned, recent: of the used cells those that eviction leaves alone, the first reason that holds. All 0
            where the stock cache runs.
    """

    layer: int
    cells: int
    used: int
    evicted: int
    bytes: int
    sinks: int
    pinned: int
    recent: int

    @property
    def chosen(self) -> int:
        """Used cells that are held for their scores, or because nothing had to be evicted yet."""
        return self.used - self.sinks - self.pinned - self.recent


@dataclass(frozen=True)
class KVStats:
    """The KV cache of a context.

    Attributes:
        active: False where the stock, full cache runs.
        budget: share of the full cache that the layers have, in (0, 1]; 1.0 for the full cache.
        scorer: token-scoring rule.
        rule: allocation rule.
        calibrated: scorer that the model's layers were calibrated with; empty if they were not.
        bytes: K and V allocated, all layers and sequences.
        bytes_full: the same for the full cache.
        bytes_scorer: query samples and other eviction state.
        bytes_compute: temporary buffers of all backends, for the largest ubatch.
        bytes_work: bound of what the CPU backend needs beside them.
        bytes_weights: tensors of the model.
        bytes_other: about what a process takes beside all that: records of the cells, logits, graphs.
        bytes_device: of all these what lies in memory that devices have for themselves, and the process does not take.
        n_ctx_seq: positions of one sequence.
        n_ubatch: tokens computed at once.
        n_score: scoring passes.
        n_evict: cells freed by eviction, all layers.
        n_reeval: tokens to be evaluated again, because the sequence went back to where some layer had evicted since.
        t_evict_us: microseconds spent on scoring and eviction.
        layers: one entry for each layer whose cells grow with the context.
    """

    active: bool
    budget: float
    scorer: str
    rule: str
    calibrated: str
    bytes: int
    bytes_full: int
    bytes_scorer: int
    bytes_compute: int
    bytes_work: int
    bytes_weights: int
    bytes_other: int
    bytes_device: int
    n_ctx_seq: int
    n_ubatch: int
    n_score: int
    n_evict: int
    n_reeval: int
    t_evict_us: int
    layers: list[LayerStats]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts and lists, for JSON."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """What `run` and `chat` say of it in JSON: budget, sizes in bytes, and the cells of each layer."""
        names = ("layer", "cells", "used", "evicted", "sinks", "pinned", "recent", "chosen")
        return {
            "budget": self.budget,
            "bytes": self.bytes,
            "bytes_full": self.bytes_full,
            "layers": [{name: getattr(layer, name) for name in names} for layer in self.layers],
        }


def read_stats(ctx: Any, seq_id: int = 0) -> KVStats:
    """Statistics of a `llama_context`, with the occupancy of one sequence.

    Raises:
        DepthKVError: the engine refused.
    """
    raw = capi.llama_depthkv_stats()
    if not capi.llama_depthkv_get_stats(ctx, ctypes.byref(raw)):
        raise DepthKVError(capi.last_error() or "the engine gave no statistics for this context")
    layers = (capi.llama_depthkv_layer * raw.n_layers)()
    for i in range(raw.n_layers):
        if not capi.llama_depthkv_get_layer(ctx, i, seq_id, ctypes.byref(layers[i])):
            raise DepthKVError(capi.last_error() or f"the engine gave no statistics for KV layer {i}")
    return from_raw(raw, layers)


def from_raw(raw: Any, layers: Any) -> KVStats:
    """The same of a `llama_depthkv_stats`, and an array of `llama_depthkv_layer` of at least its length."""
    values = {name: getattr(raw, name) for name, _ in raw._fields_ if name != "n_layers"}
    values |= {name: value.decode() for name, value in values.items() if isinstance(value, bytes)}
    # the engine's 0.4 is a 32-bit float: 0.4 rather than 0.4000000059604645
    values["budget"] = float(str(np.float32(raw.budget)))
    names = [name for name, _ in capi.llama_depthkv_layer._fields_]
    values["layers"] = [LayerStats(**{name: getattr(layers[i], name) for name in names}) for i in range(raw.n_layers)]
    return KVStats(**values)
