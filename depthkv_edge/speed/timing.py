"""From timings to numbers: tokens per second, and ratios between configurations that took turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Tokens, the seconds that they took, and how many of these went into scoring and eviction.

    Attributes:
        token_seconds: of each token, where they were computed one by one.
    """

    tokens: int
    seconds: float
    evict_seconds: float = 0.0
    token_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """Speed against another configuration's: the median over n interleaved samples, the lowest and the highest.

    Attributes:
        against: label of the other configuration.
    """

    ratio: float
    low: float
    high: float
    n: int
    against: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Speed:
    """One quantity of one configuration.

    Attributes:
        tokens_per_second: median over the samples.
        evict_share: of the time, what went into scoring and eviction.
    """

    tokens_per_second: float
    evict_share: float
    against: Ratio

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens_per_second": self.tokens_per_second,
            **self.against.to_dict(),
            "evict_share": self.evict_share,
        }


@dataclass(frozen=True)
class Latency:
    """Seconds that single tokens took: the median, what one in a hundred exceeds, and the longest, of n."""

    p50: float
    p99: float
    max: float
    n: int

    @classmethod
    def of(cls, timings: Sequence[Timing]) -> Latency:
        """Of what was computed one by one: at least one token."""
        seconds = sorted(total(timings).token_seconds)
        n = len(seconds)
        return cls(statistics.median(seconds), seconds[math.ceil(0.99 * n) - 1], seconds[-1], n)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def total(timings: Sequence[Timing]) -> Timing:
    """Everything together."""
    return Timing(
        sum(t.tokens for t in timings),
        sum(t.seconds for t in timings),
        sum(t.evict_seconds for t in timings),
        tuple(seconds for t in timings for seconds in t.token_seconds),
    )


def seconds_per_token(samples: Sequence[Timing]) -> float:
    """Median over the samples."""
    return statistics.median(sample.seconds / sample.tokens for sample in samples)


def fastest(samples: dict[str, list[Timing]]) -> str:
    """Label of the configuration with the least seconds per token."""
    return min(samples, key=lambda label: seconds_per_token(samples[label]))


def compare(samples: Sequence[Timing], others: Sequence[Timing], against: str) -> Ratio:
    """How many times faster samples are than others that were taken in turns with them; above 1 is faster."""
    ratios = [
        (other.seconds / other.tokens) / (sample.seconds / sample.tokens)
        for sample, other in zip(samples, others, strict=True)
    ]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios), against)


def speed(samples: Sequence[Timing], others: Sequence[Timing], against: str) -> Speed:
    """Speed of samples, and against others that were taken in turns with them."""
    everything = total(samples)
    return Speed(
        tokens_per_second=1 / seconds_per_token(samples),
        evict_share=everything.evict_seconds / everything.seconds,
        against=compare(samples, others, against),
    )
