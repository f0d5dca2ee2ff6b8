"""What `bench` measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from depthkv_edge.speed.process import Configuration, ContextFacts
from depthkv_edge.speed.timing import Latency, Speed


@dataclass(frozen=True)
class BenchRow:
    """One configuration.

    Attributes:
        facts: of its context, at the end.
        kv_bytes: K and V allocated.
        kv_share: of the full F16 cache of the same context.
        evict_share: of all the time computed, what went into scoring and eviction.
        prefill: of the long prompt, from empty.
        prefill_full: at its end, batch by batch.
        decode: by depth, see `depthkv_edge.speed.schedule.DEPTHS`.
        latency: of single tokens while decoding, by depth.
        first_token_seconds: for the long prompt and one token after it, median.
    """

    configuration: Configuration
    facts: ContextFacts
    kv_bytes: int
    kv_share: float
    evict_share: float
    prefill: Speed
    prefill_full: Speed
    decode: dict[str, Speed]
    latency: dict[str, Latency]
    first_token_seconds: float

    @property
    def is_stock(self) -> bool:
        """Whether it is measured on another build."""
        return self.configuration.library is not None

    def to_dict(self) -> dict[str, Any]:
        of = self.configuration
        return {
            "label": of.label,
            "budget": of.budget,
            "type": of.type,
            "flash_attn": "auto" if of.flash_attn is None else of.flash_attn,
            "rule": self.facts.rule,
            "library": "stock" if self.is_stock else "this",
            "n_ubatch": self.facts.n_ubatch,
            "kv_bytes": self.kv_bytes,
            "kv_share": self.kv_share,
            "compute_bytes": self.facts.compute_bytes,
            "scorer_bytes": self.facts.scorer_bytes,
            "peak_rss_bytes": self.facts.peak_rss_bytes,
            "evict_share": self.evict_share,
            "prefill": self.prefill.to_dict(),
            "prefill_full": self.prefill_full.to_dict(),
            "decode": {depth: speed.to_dict() for depth, speed in self.decode.items()},
            "latency": {depth: latency.to_dict() for depth, latency in self.latency.items()},
            "first_token_seconds": self.first_token_seconds,
        }


@dataclass(frozen=True)
class PairRatio:
    """Speed against another build, over turns of pairs of processes; above 1 is faster.

    Attributes:
        ratio: median over all turns.
        interval: 95 % confidence, by bootstrap over the pairs.
        low, high: range of the medians of single pairs.
        n: pairs.
    """

    ratio: float
    interval: tuple[float, float]
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"interval": list(self.interval)}


@dataclass(frozen=True)
class Baseline:
    """This package's library without a budget, against another build, in pairs of fresh processes.

    Attributes:
        directory: of the other build's libraries.
        is_patched: it carries our patches itself, so that nothing is compared with stock.
        identical_logits: every logit that was compared had the same bits.
    """

    directory: Path
    is_patched: bool
    identical_logits: bool
    prefill: PairRatio
    decode: PairRatio

    def to_dict(self) -> dict[str, Any]:
        return {
            "used": True,
            "directory": str(self.directory),
            "is_patched": self.is_patched,
            "identical_logits": self.identical_logits,
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
        }


NO_BASELINE = {"used": False, "directory": None, "identical_logits": None}


@dataclass(frozen=True)
class BenchResult:
    """Everything that one run measured.

    Attributes:
        settings: as JSON: what was asked for, and the plan that it came to.
        baseline: None: this package's own library stood in for stock.
        seconds: that it took.
    """

    command: str
    version: str
    machine: dict[str, Any]
    engine: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    baseline: Baseline | None
    seconds: float
    rows: tuple[BenchRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts and lists, for JSON."""
        return {
            "command": self.command,
            "version": self.version,
            "machine": self.machine,
            "engine": self.engine,
            "model": self.model,
            "settings": self.settings,
            "baseline": self.baseline.to_dict() if self.baseline else NO_BASELINE,
            "seconds": self.seconds,
            "rows": [row.to_dict() for row in self.rows],
        }
