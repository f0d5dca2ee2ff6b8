"""How far a mean may be off."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_N_RESAMPLES = 2000
_N_DRAWN = 2**22  # values drawn at once: bounds the memory


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (percentiles), the same for the same values.

    Fewer than three values, or values without spread, say nothing about it: both ends are the mean.
    """
    from scipy import stats  # takes a second, and nothing else here needs it

    mean = float(np.mean(values))
    if len(values) < 3 or np.ptp(values) == 0:
        return mean, mean
    low, high = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=_N_RESAMPLES,
        batch=max(1, _N_DRAWN // len(values)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return min(float(low), mean), max(float(high), mean)
