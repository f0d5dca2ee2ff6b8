"""Budgets from the curves against equal ones, in the full-precision model.

All layers are pruned at once, but what each of them evicts follows from the queries, keys and values of the full cache:
the engine's layers see those that the pruning below them has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from depthkv_edge.calibrate.corpus import WindowTokens
from depthkv_edge.calibrate.heldout import HeldOut
from depthkv_edge.calibrate.layer_cells import LayerCells
from depthkv_edge.calibrate.target import Target
from depthkv_edge.calibrate.window import prefill, run_tail


def check(
    target: Target,
    windows: Sequence[WindowTokens],
    recall: Sequence[WindowTokens],
    n_tail: int,
    scorer: str,
    uniform: LayerCells,
    calibrated: LayerCells,
    on_step: Callable[[int], None] = lambda n: None,
) -> HeldOut:
    """Run both plans on every held-out window.

    Args:
        windows, recall: of running text, and those that ask.
        on_step: told the number of tokens of each chunk of prefill.
    """

    def losses(tokens: WindowTokens) -> list[float]:
        plans, n = (uniform, calibrated), tokens.n_tail or n_tail
        window = run_tail(prefill(target, tokens.tokens, n, scorer, plans, on_step, tokens.asked))
        return [window.rerun(dict.fromkeys(target.layer_ids, plan)) for plan in range(2)]

    return HeldOut.of([losses(each) for each in windows], [losses(each) for each in recall])
