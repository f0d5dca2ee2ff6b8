"""Is there a gain? Budgets from the curves against equal ones, on windows that were not measured.

All layers are pruned at once, but what each of them evicts follows from the queries, keys and values of the full cache:
the engine's layers see those that the pruning below them has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from depthkv_edge.calibrate.corpus import WindowTokens
from depthkv_edge.calibrate.target import Target
from depthkv_edge.calibrate.window import LayerCells, prefill, run_tail
from depthkv_edge.engine import capi
from depthkv_edge.engine.rules import N_ALIGN, N_CELLS_MIN
from depthkv_edge.modelfile.keys import CHECK_BUDGET

UNIFORM = "uniform"
DEFAULT_RULE = "optimal"


@dataclass(frozen=True)
class HeldOut:
    """Mean KL divergence, nats per token, on the held-out windows at `CHECK_BUDGET` with all layers pruned at once."""

    uniform: float
    calibrated: float

    @property
    def gain(self) -> float:
        """How many times lower the divergence is; above 1 is better. 1 if neither budget loses anything."""
        if self.calibrated == 0:
            return 1.0 if self.uniform == 0 else float("inf")
        return self.uniform / self.calibrated

    @property
    def rule(self) -> str:
        """The allocation rule that the windows speak for."""
        return DEFAULT_RULE if self.gain > 1 else UNIFORM


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


def check(
    target: Target,
    windows: Sequence[WindowTokens],
    n_tail: int,
    scorer: str,
    uniform: LayerCells,
    calibrated: LayerCells,
    on_step: Callable[[int], None] = lambda n: None,
) -> HeldOut:
    """Run both plans on every held-out window.

    Args:
        on_step: told the number of tokens of each chunk of prefill.
    """
    found = []
    for tokens in windows:
        window = run_tail(prefill(target, tokens.tokens, n_tail, scorer, (uniform, calibrated), on_step))
        found.append([window.rerun(dict.fromkeys(target.layer_ids, plan)) for plan in range(2)])
    mean = np.mean(found, axis=0)
    return HeldOut(float(mean[0]), float(mean[1]))
