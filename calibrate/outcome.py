"""What a calibration found, and where else than into the model file it goes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from depthkv_edge import __version__
from depthkv_edge.calibrate.calibrate_settings import CalibrateSettings
from depthkv_edge.calibrate.corpus import Corpus, printable
from depthkv_edge.calibrate.curves import Curves
from depthkv_edge.calibrate.heldout import HeldOut
from depthkv_edge.engine.rules import N_RECENT, N_SINK
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.keys import CHECK_BUDGET, Calibration

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came out.

    Attributes:
        calibration: as written.
        held_out: the check on windows that were not measured.
        measured: [W, L, R] nats per token, of every window of running text.
        recall: the same of the windows that ask for hidden facts; None if there are none.
        agreement: Spearman correlation of `fast` with `exact` over (all points, layers), if both were measured.
        seconds: that this process spent on measuring in this run, by method: prefill and all, without the held-out
            check, and without what an interrupted run had done.
    """

    calibration: Calibration
    held_out: HeldOut
    measured: np.ndarray
    output: Path
    agreement: tuple[float, float] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    recall: np.ndarray | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        c = self.calibration
        return {
            "output": str(self.output),
            "model": c.model,
            "corpus": c.corpus,
            "method": c.method,
            "scorer": c.scorer,
            "windows": c.windows,
            "recall_windows": c.recall_windows,
            "window_tokens": c.window_tokens,
            "tokens": c.tokens,
            "layer_ids": list(c.layer_ids),
            "keep_ratios": list(c.keep_ratios),
            "sensitivity": c.sensitivity.tolist(),
            "sensitivity_se": c.sensitivity_se.tolist(),
            "stability": _number(c.stability),
            "rule": c.rule,
            "held_out": asdict(self.held_out) | {"budget": CHECK_BUDGET, "gain": _number(self.held_out.gain)},
            "fast_agreement": None if self.agreement is None else [_number(x) for x in self.agreement],
            "seconds": self.seconds,
        }


def make_calibration(
    settings: CalibrateSettings,
    layer_ids: tuple[int, ...],
    corpus: Corpus,
    curves: Curves,
    held_out: HeldOut,
    method: str,
    budget: float | None,
) -> Calibration:
    """What goes into the model file.

    Args:
        layer_ids: index of each layer that was measured.
        budget: that the file has already.
    """
    return Calibration(
        layer_ids=layer_ids,
        keep_ratios=settings.ratios,
        sensitivity=curves.sensitivity,
        sensitivity_se=curves.sensitivity_se,
        scorer=settings.scorer,
        sink_tokens=N_SINK,
        recent_tokens=N_RECENT,
        rule=held_out.rule,
        model=printable(settings.model),
        corpus=corpus.name,
        tokens=(settings.windows + settings.recall) * settings.window_tokens,
        windows=settings.windows,
        recall_windows=settings.recall,
        window_tokens=settings.window_tokens,
        method=method,
        stability=curves.stability,
        gain=held_out.gain if held_out.gain < np.finfo(np.float32).max else math.nan,  # nothing is lost at all
        tool=f"depthkv-edge {__version__}",
        budget=budget,
    )


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


def check_dump(path: Path, settings: CalibrateSettings) -> None:
    """Check that `dump_curves` can do its work, before hours go into a calibration.

    Raises:
        DepthKVError: the file cannot be written, or is one of the model's.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a directory" if path.is_dir() else f"{path.parent} is not a directory"
        raise DepthKVError(f"{path} cannot be written: {what}; give the path of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DepthKVError(f"{path} cannot be written: it is read-only; choose another path")
    for other in (settings.output, settings.gguf, Path(settings.model)):
        if other is not None and path.resolve() == other.resolve():
            raise DepthKVError(f"--curves {path} is the model file: choose another path")


def dump_curves(outcome: Outcome, path: Path) -> None:
    """Write the outcome with the curves of every window as JSON.

    Raises:
        DepthKVError: the file cannot be written.
    """
    recall = None if outcome.recall is None else outcome.recall.tolist()
    per_window = {"per_window": outcome.measured.tolist(), "per_recall_window": recall}
    try:
        path.write_text(json.dumps(outcome.to_dict() | per_window) + "\n")
    except OSError as error:
        raise DepthKVError(f"{path} cannot be written: {error.strerror}") from None
