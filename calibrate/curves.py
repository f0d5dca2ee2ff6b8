"""From measurements of windows to the curves that a model file carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Curves:
    """Sensitivity of each layer at each keep ratio.

    Attributes:
        sensitivity: float32 [L, R] mean over the windows, which count the same; nats per token, never rising with the
            keep ratio.
        sensitivity_se: float32 [L, R] standard error of that mean; 0 if there is one window.
        stability: mean Spearman correlation of the layers' sensitivity between texts (between windows if there is one
            text, NaN if there is one window): how far the order of the layers depends on what is read.
    """

    sensitivity: np.ndarray
    sensitivity_se: np.ndarray
    stability: float


# weight of the windows that ask for hidden facts, beside those of running text (docs/calibration.md has the table)
RECALL_SHARE = 0.5


def build_curves(measured: np.ndarray, texts: Sequence[int], recall: np.ndarray | None = None) -> Curves:
    """Average the windows so that each of a kind counts the same.

    A single window of repetitive text can lose fifty times what another does, and would be all that a plain mean of a
    few windows says. So each window is divided by its mean over layers and ratios, and the average is scaled back by
    the geometric mean of those. A window that loses nothing says nothing.

    A mean of finite samples may rise with the keep ratio where the truth is flat. A curve that does is replaced by the
    nearest one that does not.

    Windows that ask for hidden facts lose far more than running text does, in a few layers. Scaled to the same level
    they make up `RECALL_SHARE` of the curves, which so stay in the nats of running text.

    Args:
        measured: [W, L, R] nats per token, keep ratios ascending.
        texts: [W] index of the text each window comes from.
        recall: the same of windows that ask, or none.
    """
    level, mean, error = _average(measured)
    if recall is not None and recall.any():
        level_recall, mean_recall, error_recall = _average(recall)
        if level:
            mean = (1 - RECALL_SHARE) * mean + RECALL_SHARE * mean_recall
            error = np.hypot((1 - RECALL_SHARE) * error, RECALL_SHARE * error_recall)
        else:
            level, mean, error = level_recall, mean_recall, error_recall
    falling = np.stack([_falling(curve) for curve in np.maximum(level * mean, 0)])
    return Curves(falling.astype(np.float32), (level * error).astype(np.float32), stability(measured, texts))


def _average(measured: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(geometric mean of the windows' levels, mean [L, R] of the windows at level 1, its standard error [L, R])."""
    level = measured.mean(axis=(1, 2))
    speaking = level > 0
    if not speaking.any():
        nothing = np.zeros(measured.shape[1:])
        return 0.0, nothing, nothing
    level = level[speaking]
    scaled = measured[speaking] / level[:, None, None]
    n_windows = len(scaled)
    mean = scaled.mean(axis=0)
    error = scaled.std(axis=0, ddof=1) / np.sqrt(n_windows) if n_windows > 1 else np.zeros_like(mean)
    return float(np.exp(np.log(level).mean())), mean, error


def _falling(curve: np.ndarray) -> np.ndarray:
    """The nearest curve that never rises, by least squares: neighbours that do are pooled at their mean.

    As scipy.optimize.isotonic_regression. Written here because a device that calibrates with the engine has no scipy.
    """
    pools: list[tuple[float, int]] = []
    for value in curve.tolist():
        mean, n = value, 1
        while pools and pools[-1][0] < mean:
            before, n_before = pools.pop()
            mean, n = (before * n_before + mean * n) / (n_before + n), n_before + n
        pools.append((mean, n))
    return np.concatenate([np.full(n, mean) for mean, n in pools])


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; as scipy.stats.spearmanr, for the same reason as above."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Of [n] values; those that are equal share the mean of theirs."""
    _, inverse, n = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(n) - (n - 1) / 2)[inverse]


def stability(measured: np.ndarray, texts: Sequence[int]) -> float:
    """Mean Spearman correlation over all pairs of texts, or of windows if there is only one text.

    What is compared of two texts is the sensitivity of every layer at every keep ratio, ranked over the layers and
    averaged over the ratios at which not all layers are equal.

    Args:
        measured: [W, L, R] nats per token.
        texts: [W] index of the text each window comes from.
    """
    groups = [measured[np.asarray(texts) == text].mean(axis=0) for text in sorted(set(texts))]
    if len(groups) < 2:
        groups = list(measured)
    found = [layer_correlation(groups[i], groups[j]) for i in range(len(groups)) for j in range(i + 1, len(groups))]
    return float(np.nanmean(found)) if found and not np.isnan(found).all() else float("nan")


def layer_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman correlation over the layers of two sets of curves [L, R], mean of the keep ratios; NaN if undefined."""
    found = [
        _spearman(a[:, r], b[:, r]) for r in range(a.shape[1]) if np.ptp(a[:, r]) > 0 and np.ptp(b[:, r]) > 0
    ]
    return float(np.mean(found)) if found else float("nan")


def curve_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman correlation over all points of two sets of curves [L, R]; NaN if undefined."""
    return _spearman(a.ravel(), b.ravel()) if np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")
