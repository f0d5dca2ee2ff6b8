"""All windows of a calibration, by every method that is asked for: resumable by layer, over several processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np

from depthkv_edge.calibrate import exact, fast
from depthkv_edge.calibrate.calibrate_settings import (
    AVERAGE_SECONDS,
    BOTH,
    EXACT,
    FAST,
    RECALL,
    SCREENED,
    CalibrateSettings,
    not_finite,
)
from depthkv_edge.calibrate.corpus import Corpus, WindowTokens
from depthkv_edge.calibrate.parallel import Processes
from depthkv_edge.calibrate.state import SavedState
from depthkv_edge.calibrate.target import Target
from depthkv_edge.calibrate.window import Prefilled, Window, prefill, run_tail
from depthkv_edge.measure.progress import progress

# for the time left, in runs of one layer: head and divergence; eviction, the change of the output and its gradient
_HEAD_COST, _FAST_COST = 6, 6
_SCREEN = "screen"  # what a layer loses to hidden facts at the lowest keep ratio


def methods_of(settings: CalibrateSettings) -> list[str]:
    """Everything that is measured with these settings."""
    chosen = [method for method in (EXACT, FAST) if settings.method in (method, BOTH)]
    return chosen + ([RECALL] if settings.recall else [])


def forget(settings: CalibrateSettings, state: SavedState) -> None:
    """Remove what these settings have measured."""
    state.remove([*methods_of(settings), _SCREEN])


def measure(
    settings: CalibrateSettings,
    target: Target,
    corpus: Corpus,
    processes: Processes,
    state: SavedState,
    say: Callable[[str], None],
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """[W, L, R] nats per token for each method that is asked for, or that is complete anyway; and the seconds."""
    work = _Measurement(settings, target, corpus, state)
    methods = methods_of(settings)
    windows = {method: range(processes.rank, len(work.windows(method)), processes.count) for method in methods}
    todo = [(method, window, work.missing(method, window)) for method in methods for window in windows[method]]
    todo = [(method, window, layers) for method, window, layers in todo if layers]
    total = sum(work.cost_of(*each) for each in todo)
    if processes.rank == 0 and len(state):
        say(f"going on where an interrupted calibration was: {len(state)} measurements of a layer are there")

    seconds = dict.fromkeys(methods, 0.0)
    shown = progress("measuring", total, AVERAGE_SECONDS) if processes.rank == 0 else nullcontext(lambda n: None)
    with shown as advance:
        for method, index, layers in todo:
            start = time.perf_counter()
            work.run(method, index, layers, advance)
            seconds[method] += time.perf_counter() - start

    own = [
        (method, window, [state.get(method, window, layer) for layer in target.layer_ids])
        for method in (EXACT, FAST, RECALL)
        for window in range(processes.rank, len(work.windows(method)), processes.count)
        if not work.missing(method, window)
    ]
    found = processes.gather(own)
    result = {}
    for method in (EXACT, FAST, RECALL):
        curves = {window: curve for of, window, curve in found if of == method}
        if len(curves) == len(work.windows(method)) > 0:
            result[method] = np.array([curves[window] for window in range(len(curves))])
    return result, seconds


class _Measurement:
    """What is measured of a window by a method, and what that costs."""

    def __init__(self, settings: CalibrateSettings, target: Target, corpus: Corpus, state: SavedState):
        self._settings = settings
        self._target = target
        self._corpus = corpus
        self._state = state
        self._plans = settings.plans(len(target.layer_ids))

    def windows(self, method: str) -> Sequence[WindowTokens]:
        return self._corpus.recall if method == RECALL else self._corpus.windows

    def missing(self, method: str, window: int) -> list[int]:
        return [layer for layer in self._target.layer_ids if self._state.get(method, window, layer) is None]

    def cost_of(self, method: str, index: int, layers: Sequence[int]) -> float:
        """In runs of one layer over one token."""
        n_prefill = self._settings.window_tokens - self._n_tail(method, index)
        return n_prefill * len(self._target.layers) + sum(self._cost(method, index, layer) for layer in layers)

    def _n_tail(self, method: str, index: int) -> int:
        return self.windows(method)[index].n_tail or self._settings.tail_tokens(method)

    def _cost(self, method: str, index: int, layer: int) -> float:
        n_runs = _FAST_COST if method == FAST else len(self._plans) * self._cost_of_run(layer)
        return self._n_tail(method, index) * n_runs

    def _cost_of_run(self, layer: int) -> int:
        return len(self._target.layers) - layer + _HEAD_COST

    def run(self, method: str, index: int, layers: Sequence[int], advance: Callable[[float], None]) -> None:
        n_layers = len(self._target.layers)
        tokens = self.windows(method)[index]
        prefilled: Prefilled = prefill(
            self._target,
            tokens.tokens,
            self._n_tail(method, index),
            self._settings.scorer,
            self._plans,
            lambda n: advance(n * n_layers),
            tokens.asked,
        )
        if method == FAST:
            seed = self._settings.seed * 1_000_003 + index
            self._put(
                FAST, index, fast.measure_window(prefilled, seed, lambda: advance(self._cost(FAST, index, layers[0])))
            )
            return
        window = run_tail(prefilled)
        if method == RECALL:
            self._recall(window, index, layers, advance)
            return
        for layer in layers:
            self._put(EXACT, index, {layer: exact.measure_layer(window, layer)})
            advance(self._cost(EXACT, index, layer))

    def _recall(self, window: Window, index: int, layers: Sequence[int], advance: Callable[[float], None]) -> None:
        """First every layer at the lowest keep ratio; at the others those that lose something there."""
        n_plans, n_tail = len(self._plans), self._n_tail(RECALL, index)
        worst = 0.0
        for layer in self._target.layer_ids:
            if self._state.get(_SCREEN, index, layer) is None:
                self._put(_SCREEN, index, {layer: [window.rerun({layer: 0})]})
            if layer in layers:
                advance(n_tail * self._cost_of_run(layer))
            worst = max(worst, self._screened(index, layer))
        for layer in layers:
            first = self._screened(index, layer)
            if first > SCREENED * worst:
                rest = [window.rerun({layer: plan}) for plan in range(1, n_plans)]
            else:
                rest = [first * (1 - ratio) / (1 - self._settings.ratios[0]) for ratio in self._settings.ratios[1:]]
            self._put(RECALL, index, {layer: [first, *rest]})
            advance(n_tail * (n_plans - 1) * self._cost_of_run(layer))

    def _screened(self, index: int, layer: int) -> float:
        found = self._state.get(_SCREEN, index, layer)
        assert found is not None
        return found[0]

    def _put(self, method: str, window: int, curves: dict[int, list[float]]) -> None:
        for layer, curve in curves.items():
            if not all(map(math.isfinite, curve)):
                raise not_finite(f"what layer {layer} loses in window {window}", curve, self._settings)
        self._state.put(method, window, curves)
