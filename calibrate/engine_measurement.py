"""All windows of a calibration by the engine: resumable by layer, and longest where it changes the allocation.

By ablation, as `exact`, but of the weights as the device has them, and with what a layer forgets taken from a run in
which all of them do. With quantised weights any change at all, however small, rounds the activations anew and costs a
divergence of its own, more than most layers lose. It is measured, at some layers of every window, and taken off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from depthkv_edge.calibrate.calibrate_settings import (
    AVERAGE_SECONDS,
    ENGINE,
    RECALL,
    SCREENED,
    CalibrateSettings,
    not_finite,
)
from depthkv_edge.calibrate.corpus import Corpus, WindowTokens
from depthkv_edge.calibrate.engine_window import EngineWindow, open_engine_window
from depthkv_edge.calibrate.state import SavedState
from depthkv_edge.engine.model import Model
from depthkv_edge.measure.progress import progress

NOISE = "noise"
_FIRST = "first"  # what a layer loses at the lowest keep ratio
_N_NOISE = 12  # layers at which noise is measured

# how the loss of a layer of little sensitivity falls with the keep ratio, ((1 - r)/r)^1.5: .326 .097 .022 .003 of that
# at .05 for .1 .2 .4 .7. Measured, as the median over the layers: .321 .098 .022 .001 on SmolLM2-135M and .52 .17 .033
# .002 on Qwen2.5-Coder-1.5B
_EXPONENT = 1.5

Advance = Callable[[int], None]


def forget(state: SavedState) -> None:
    """Remove what the engine has measured."""
    state.remove([ENGINE, RECALL, *(f"{kind}-{of}" for kind in (NOISE, _FIRST) for of in (ENGINE, RECALL))])


def measure(settings: CalibrateSettings, model: Model, corpus: Corpus, state: SavedState) -> dict[str, np.ndarray]:
    """[W, L, R] nats per token, of the windows of text by ENGINE and of those that ask by RECALL."""
    work = [(ENGINE, i, window) for i, window in enumerate(corpus.windows)]
    work += [(RECALL, i, window) for i, window in enumerate(corpus.recall)]
    layers = range(model.n_layers)
    todo = [each for each in work if any(state.get(each[0], each[1], layer) is None for layer in layers)]
    cost = sum(_cost(settings, window, len(layers)) for _, _, window in todo)
    with progress("measuring", cost, AVERAGE_SECONDS) as advance:
        for method, index, window in todo:
            _Measured(settings, model, state, method, index, window, advance).run()
    return {
        method: np.array([[state.get(method, i, layer) for layer in layers] for i in range(len(windows))])
        for method, windows in ((ENGINE, corpus.windows), (RECALL, corpus.recall))
        if windows
    }


def _n_tail(settings: CalibrateSettings, window: WindowTokens) -> int:
    return window.n_tail or settings.tail_tokens(ENGINE)


def _cost(settings: CalibrateSettings, window: WindowTokens, n_layers: int) -> int:
    """In tokens, if every layer were measured at every keep ratio."""
    n_tail, n_ratios = _n_tail(settings, window), len(settings.ratios)
    n_noise = min(_N_NOISE, n_layers)
    return (len(window.tokens) - n_tail) * (1 + n_ratios) + n_tail * (1 + n_noise + n_layers * n_ratios)


class _Measured:
    """One window, by one method."""

    def __init__(
        self,
        settings: CalibrateSettings,
        model: Model,
        state: SavedState,
        method: str,
        index: int,
        window: WindowTokens,
        advance: Advance,
    ):
        self._settings = settings
        self._model = model
        self._state = state
        self._method = method
        self._index = index
        self._window = window
        self._advance = advance
        self._plans = settings.plans(model.n_layers)

    def run(self) -> None:
        settings, window = self._settings, self._window
        n_tail = settings.tail_tokens(ENGINE)
        with open_engine_window(self._model, window, n_tail, settings.scorer, self._advance) as opened:
            self._run(opened)

    def _run(self, window: EngineWindow) -> None:
        layers = range(self._model.n_layers)
        noise, scatter = self._noise(window)
        first = [self._first(window, layer) - noise[layer] for layer in layers]
        least = max(SCREENED * max(first), 2 * scatter)
        # what matters most comes first: an interrupted calibration has the most of it
        for layer in sorted(layers, key=lambda layer: -first[layer]):
            if self._state.get(self._method, self._index, layer) is None:
                self._put(self._method, layer, self._curve(window, layer, first[layer], noise[layer], least))

    def _noise(self, window: EngineWindow) -> tuple[np.ndarray, float]:
        """([L] nats per token, how far one measurement is from it)."""
        n_layers = self._model.n_layers
        n = min(_N_NOISE, n_layers)
        at = [round(i * (n_layers - 1) / max(n - 1, 1)) for i in range(n)]
        kind = f"{NOISE}-{self._method}"
        for i, layer in enumerate(at):
            if self._state.get(kind, self._index, layer) is None:
                position = len(window.past) * (i + 1) // (n + 1)
                self._put(kind, layer, [window.noise(layer, position)])
        found = [self._found(kind, layer) for layer in at]
        # it depends on how many layers are left to round in, and hardly otherwise
        line = np.polyfit(at, found, min(1, n - 1))
        fitted = np.maximum(np.polyval(line, np.arange(n_layers)), 0.0)
        return fitted, float(np.std(np.array(found) - fitted[at]))

    def _first(self, window: EngineWindow, layer: int) -> float:
        kind = f"{_FIRST}-{self._method}"
        if self._state.get(kind, self._index, layer) is None:
            self._put(kind, layer, [window.lose(layer, self._plans[0])])
        return self._found(kind, layer)

    def _curve(self, window: EngineWindow, layer: int, first: float, noise: float, least: float) -> list[float]:
        """What the layer loses at each keep ratio: measured as long as it is more than `least`."""
        curve = [max(first, 0.0)]
        for plan in self._plans[1:]:
            if curve[-1] <= least:
                break
            curve.append(max(window.lose(layer, plan) - noise, 0.0))
        n_left = len(self._plans) - len(curve)
        self._advance(n_left * len(window.tail))
        last = self._fall(len(curve) - 1)
        return curve + [curve[-1] * self._fall(i) / last for i in range(len(curve), len(self._plans))]

    def _fall(self, i: int) -> float:
        ratio = self._settings.ratios[i]
        # what a hidden fact costs falls late: the token is held or it is not
        return (1 - ratio) if self._method == RECALL else ((1 - ratio) / ratio) ** _EXPONENT

    def _found(self, kind: str, layer: int) -> float:
        found = self._state.get(kind, self._index, layer)
        assert found is not None
        return found[0]

    def _put(self, kind: str, layer: int, curve: Sequence[float]) -> None:
        if not all(map(math.isfinite, curve)):
            raise not_finite(f"what layer {layer} loses in window {self._index}", curve, self._settings)
        self._state.put(kind, self._index, {layer: list(curve)})
