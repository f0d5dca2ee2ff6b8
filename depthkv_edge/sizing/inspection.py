"""What a model file says of its layers, and the KV cells that the engine gives them for a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from depthkv_edge.engine.budget import Budget
from depthkv_edge.engine.context import AUTO, Options, load_without_weights, plan_context, trained_ctx
from depthkv_edge.engine.devices import EVERYWHERE
from depthkv_edge.engine.rules import N_RECENT, N_SINK
from depthkv_edge.engine.stats import KVStats, LayerStats
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.keys import Calibration, read_calibration

_MAX_CTX = 2**24  # K and V are not allocated, but the engine's record of which cell holds which position is


@dataclass(frozen=True)
class Inspection:
    """A model's calibration, and the KV cache of an empty context.

    Attributes:
        model: path of the file.
        n_ctx: positions of the context.
        calibration: None if the file has none.
        kv: capacities and bytes, from the engine.
    """

    model: Path
    n_ctx: int
    calibration: Calibration | None
    kv: KVStats

    @property
    def cells(self) -> int:
        """KV cells of all layers that grow with the context."""
        return sum(layer.cells for layer in self.kv.layers)

    @property
    def cells_full(self) -> int:
        """The same for the full cache."""
        return self.n_ctx * len(self.kv.layers)

    def chosen(self, layer: LayerStats) -> int:
        """Cells of a layer that evicts whose tokens are held for their scores, where nothing is pinned.

        Of the others the model's sinks and recent tokens are held whatever they score.
        """
        n_safe = N_SINK + N_RECENT
        if self.calibration is not None:
            n_safe = self.calibration.sink_tokens + self.calibration.recent_tokens
        return layer.cells - n_safe

    def row(self, layer: int) -> int | None:
        """Row of a layer's curve in `calibration.sensitivity`; None if the layer was not calibrated."""
        if self.calibration is None or layer not in self.calibration.layer_ids:
            return None
        return self.calibration.layer_ids.index(layer)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts and lists, for JSON; what is not known is None."""
        return {
            "model": str(self.model),
            "n_ctx": self.n_ctx,
            "calibration": _facts(self.calibration),
            "kv": {
                "budget": self.kv.budget,
                "rule": self.kv.rule,
                "scorer": self.kv.scorer,
                "cells": self.cells,
                "cells_full": self.cells_full,
                "bytes": self.kv.bytes,
                "bytes_full": self.kv.bytes_full,
                "layers": [self._layer(layer) for layer in self.kv.layers],
            },
        }

    def _layer(self, layer: LayerStats) -> dict[str, Any]:
        row, calibration = self.row(layer.layer), self.calibration
        known = row is not None and calibration is not None
        return {
            "layer": layer.layer,
            "cells": layer.cells,
            "chosen": layer.cells if layer.cells >= self.n_ctx else self.chosen(layer),
            "keep_ratio": layer.cells / self.n_ctx,
            "bytes": layer.bytes,
            "sensitivity": calibration.sensitivity[row].tolist() if known else None,
            "sensitivity_se": calibration.sensitivity_se[row].tolist() if known else None,
        }


def inspect_model(path: Path, kv_budget: Budget | None = None, n_ctx: int = 0) -> Inspection:
    """Read a model's calibration, and have the engine plan a KV cache for it. No weights are read.

    Args:
        path: path of a GGUF.
        kv_budget: None for the file's own, or the full cache.
        n_ctx: positions of the context; 0 for what the model was trained for.

    Raises:
        DepthKVError: the file is damaged, its keys are corrupt, or the engine refuses the model, budget or context.
    """
    if not 0 <= n_ctx <= _MAX_CTX:
        raise DepthKVError(f"a context of {n_ctx} tokens cannot be inspected: give 1 to {_MAX_CTX}")
    calibration = read_calibration(path)
    text = None if kv_budget is None else kv_budget.text
    with load_without_weights(path, EVERYWHERE) as model:
        options = Options(n_ctx=n_ctx or _trained_ctx(model), budget=text, flash_attn=AUTO)
        try:
            kv = plan_context(model, options).kv
        except DepthKVError as error:
            raise DepthKVError(f"{path}: {error}") from None
    if not kv.layers:
        raise DepthKVError(f"{path}: no layer of the model has KV cells that grow with the context: nothing to inspect")
    return Inspection(path, kv.n_ctx_seq, calibration, kv)


def _trained_ctx(model: Any) -> int:
    n_ctx = trained_ctx(model)
    if not 0 < n_ctx <= _MAX_CTX:
        raise DepthKVError(f"the file's context of {n_ctx} tokens cannot be inspected: give 1 to {_MAX_CTX} with -c")
    return n_ctx


def _facts(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    per_layer = ("sensitivity", "sensitivity_se")
    facts = {field.name: getattr(calibration, field.name) for field in fields(calibration)}
    unknown = [name for name, value in facts.items() if isinstance(value, float) and math.isnan(value)]
    return {name: value for name, value in facts.items() if name not in per_layer} | dict.fromkeys(unknown)
