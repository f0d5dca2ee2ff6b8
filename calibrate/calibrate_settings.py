"""What `calibrate` is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from depthkv_edge.calibrate.layer_cells import LayerCells
from depthkv_edge.engine.rules import N_CELLS_MIN, aligned, check_scorer
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.keys import CHECK_BUDGET

EXACT, FAST, BOTH, ENGINE = "exact", "fast", "both", "engine"
RECALL = "recall"  # how windows that ask are measured: by ablation, whatever the method is

# the share of a window over which divergence is measured: its end, where the layers have forgotten the most. A gradient
# takes in what a token does to later ones, so a shorter one is enough
_TAIL = {EXACT: 8, FAST: 12, ENGINE: 12}

# a layer that at the lowest keep ratio loses less than this share of what the worst one does is not measured at others:
# it would take most of the time to tell nothing from nearly nothing
SCREENED = 0.01

N_HELD_OUT = 2  # windows of the check

# that the speed is averaged over: layers cost less and less, a short average would promise too much
AVERAGE_SECONDS = 1800.0

# of a window in the held-out check: two floors, or there is next to nothing to share out
_CHECK_CELLS_MIN = 2 * aligned(N_CELLS_MIN)


def default_windows(method: str) -> tuple[int, int]:
    """Windows of text, and windows that ask, where the user says nothing: the engine takes minutes for each."""
    return (2, 1) if method == ENGINE else (4, 2)


@dataclass(frozen=True)
class CalibrateSettings:
    """What the user asks for; see the options of `depthkv-edge calibrate`."""

    model: str
    gguf: Path | None
    output: Path
    corpus: tuple[str, ...] = ()
    windows: int = 4
    recall: int = 2
    window_tokens: int = 3072
    scorer: str = "attention"
    device: str = "cpu"
    dtype: str = "float32"
    method: str = EXACT
    seed: int = 0
    ratios: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.7)

    def tail_tokens(self, method: str) -> int:
        """Tokens of a window over which divergence is measured."""
        return self.window_tokens // _TAIL[method]

    def check(self) -> None:
        """Check every number.

        Raises:
            DepthKVError: one is out of range.
        """
        check_scorer(self.scorer)
        if self.windows < 1:
            raise DepthKVError(f"--windows {self.windows} is not above 0: give 1 or more")
        if self.recall < 0:
            raise DepthKVError(f"--recall {self.recall} is below 0: give 0 or more")
        if not self.ratios or any(not 0 < ratio < 1 for ratio in self.ratios):
            raise DepthKVError(f"--ratios {_join(self.ratios)} are not all between 0 and 1: give some like 0.2,0.4")
        if list(self.ratios) != sorted(set(self.ratios)):
            raise DepthKVError(f"--ratios {_join(self.ratios)} do not ascend: give each once, the lowest first")
        least = math.ceil(max(N_CELLS_MIN / self.ratios[0], _CHECK_CELLS_MIN / CHECK_BUDGET))
        if self.window_tokens < least:
            raise DepthKVError(
                f"--window-tokens {self.window_tokens} is too short: a keep ratio of {self.ratios[0]:g} must leave the "
                f"{N_CELLS_MIN} cells that a layer needs, and the held-out check at {CHECK_BUDGET:g} some to share "
                f"out; give at least {least}"
            )

    def plans(self, n_layers: int) -> list[LayerCells]:
        """Every layer at the same keep ratio, for each ratio: only one layer of a plan is pruned at a time.

        The engine rounds cells up to its granularity, so what is measured may be up to 31 cells more than the ratio
        that labels it says.
        """
        return [LayerCells((aligned(round(ratio * self.window_tokens)),) * n_layers) for ratio in self.ratios]


def _join(ratios: Sequence[float]) -> str:
    return ",".join(f"{ratio:g}" for ratio in ratios)


def not_finite(what: str, values: Sequence[float], settings: CalibrateSettings) -> DepthKVError:
    """What to say of measurements one of which is not finite."""
    value = next(x for x in values if not math.isfinite(x))
    way_out = "check the weights of the model" if settings.dtype == "float32" else "measure with --dtype float32"
    return DepthKVError(f"{what} is {value} with --dtype {settings.dtype}: {way_out}")
