"""How many cells each layer has while it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from depthkv_edge.calibrate.heldout import UNIFORM
from depthkv_edge.engine import capi
from depthkv_edge.engine.rules import N_ALIGN, N_CELLS_MIN, n_ubatch
from depthkv_edge.modelfile.keys import CHECK_BUDGET


@dataclass(frozen=True)
class LayerCells:
    """Cells of every growing layer. `n_ubatch` follows from the smallest."""

    cells: tuple[int, ...]

    @property
    def n_ubatch(self) -> int:
        return n_ubatch(min(self.cells))


def allocate(rule: str, n_tokens: int, keep_ratios: Sequence[float], sensitivity: np.ndarray) -> LayerCells:
    """Cells of every layer at `CHECK_BUDGET`, by the engine's own allocator.

    Args:
        n_tokens: cells of a full layer.
        keep_ratios: [R] ascending.
        sensitivity: [L, R] nats per token.

    Raises:
        DepthKVError: the budget is below the floor of the layers.
    """
    n_layers = len(sensitivity)
    curves = {} if rule == UNIFORM else {"keep_ratios": keep_ratios, "sensitivity": sensitivity}
    cells = capi.alloc(CHECK_BUDGET, n_layers, n_tokens, rule=rule, n_floor=N_CELLS_MIN, n_align=N_ALIGN, **curves)
    return LayerCells(tuple(cells))
