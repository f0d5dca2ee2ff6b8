"""Sensitivity by ablation: prune one layer, run the tail of the window, measure (DepthKV, arXiv 2604.24647).

Not faithful to the paper: the layer is pruned by the rules of the engine, in bounded memory, and only the tail of the
window runs with what it then holds.
"""

from __future__ import annotations

from depthkv_edge.calibrate.window import Window


def measure_layer(window: Window, layer: int) -> list[float]:
    """Mean KL divergence, nats per token, when only this layer is pruned: one value for each plan of the window.

    A plan that evicts nothing before the end of the window costs exactly 0, and is not run.

    Args:
        layer: layer index in the model.
    """
    return [window.rerun({layer: plan}) for plan in range(len(window.prefilled.plans))]
