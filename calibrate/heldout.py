"""Is there a gain? Budgets from the curves against equal ones, on windows that were not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNIFORM = "uniform"
DEFAULT_RULE = "optimal"

# how far the calibrated loss on hidden facts may be above the uniform one: a few answers are all there is to tell it by
_RECALL_TOLERANCE = 1.1


@dataclass(frozen=True)
class HeldOut:
    """Mean KL divergence, nats per token, on the held-out windows at `CHECK_BUDGET` with all layers pruned at once.

    Attributes:
        uniform, calibrated: on running text.
        recall: (uniform, calibrated) on the answers of a window that asks for hidden facts; None if there is none.
    """

    uniform: float
    calibrated: float
    recall: tuple[float, float] | None = None

    @classmethod
    def of(cls, text: Sequence[Sequence[float]], recall: Sequence[Sequence[float]]) -> HeldOut:
        """From (uniform, calibrated) of each window of text, and of each that asks."""
        uniform, calibrated = np.mean(text, axis=0).tolist()
        return cls(uniform, calibrated, tuple(np.mean(recall, axis=0).tolist()) if recall else None)

    @property
    def values(self) -> tuple[float, ...]:
        """All that was measured."""
        return (self.uniform, self.calibrated, *(self.recall or ()))

    @property
    def gain(self) -> float:
        """How many times lower the divergence on text is; above 1 is better. 1 if neither budget loses anything."""
        if self.calibrated == 0:
            return 1.0 if self.uniform == 0 else float("inf")
        return self.uniform / self.calibrated

    @property
    def rule(self) -> str:
        """The allocation rule that the windows speak for."""
        return DEFAULT_RULE if self.gain > 1 and self.remembers else UNIFORM

    @property
    def remembers(self) -> bool:
        """Whether hidden facts are found as well as with uniform budgets."""
        return self.recall is None or self.recall[1] <= _RECALL_TOLERANCE * self.recall[0]
