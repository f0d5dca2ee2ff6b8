"""What a model file says of its layers, and the KV cells that the engine gives them for a budget."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from depthkv_edge import _log, _native
from depthkv_edge._native import llama_cpp
from depthkv_edge.budget import Budget
from depthkv_edge.calibration import KEY_BUDGET, Calibration, read_calibration
from depthkv_edge.errors import DepthKVError
from depthkv_edge.gguf_file import open_gguf, scalar
from depthkv_edge.llama import load_without_weights, resolve_budget
from depthkv_edge.stats import KVStats, LayerStats, read_stats

_api = llama_cpp.llama_cpp

_N_BATCH = _N_UBATCH = 512  # what `Llama` and `run` have unless told otherwise
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
    _native.clear_error()
    with _log.capture_errors(verbose=False) as lines:
        try:
            with _context(path, kv_budget, n_ctx) as (context, budget):
                kv, n_ctx = read_stats(context, budget), _api.llama_n_ctx(context)
        except DepthKVError as error:
            raise DepthKVError(f"{path}: {error}") from None
        except ValueError as error:
            raise DepthKVError(f"{path}: {_native.last_error() or _log.reason(lines) or error}") from error
    if not kv.layers:
        raise DepthKVError(f"{path}: no layer of the model has KV cells that grow with the context: nothing to inspect")
    return Inspection(path, n_ctx, calibration, kv)


@contextlib.contextmanager
def _context(path: Path, written: Budget | None, n_ctx: int) -> Iterator[tuple[Any, float]]:
    """A `llama_context` as `Llama` would create it, and its budget. K, V and weights are not allocated."""
    params = _api.llama_context_default_params()
    params.n_batch, params.n_ubatch = _N_BATCH, _N_UBATCH
    depth = _native.llama_depthkv_default_params()
    with load_without_weights(str(path)) as model:
        params.n_ctx = n_ctx = n_ctx or _trained_ctx(model)
        if written is None:  # the engine has checked the file's own when it loaded the model
            budget = float(scalar(open_gguf(path), KEY_BUDGET) or 1.0)
        else:
            budget = resolve_budget(written, str(path), {"n_ctx": n_ctx, "n_batch": _N_BATCH, "n_ubatch": _N_UBATCH})
        if budget < 1.0:
            params.swa_full = False
        depth.budget = budget
        context = _native.llama_depthkv_init_from_model(model, params, depth)
        if not context:
            raise ValueError("the engine cannot create a context")
        try:
            yield context, budget
        finally:
            _api.llama_free(context)


def _trained_ctx(model: Any) -> int:
    n_ctx = int(_api.llama_model_n_ctx_train(model)) % 2**32  # the file's number has no sign, the API's has one
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
