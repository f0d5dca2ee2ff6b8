"""What an evaluation found, as JSON that the table, the plots and the page are drawn from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from depthkv_edge import __version__
from depthkv_edge.measure.facts import engine_facts, machine_facts, model_facts
from depthkv_edge.quality.eval_settings import EvalSettings
from depthkv_edge.quality.rows import KVBytes, Row
from depthkv_edge.quality.store import Record


@dataclass(frozen=True)
class RowResult:
    """One row.

    Attributes:
        window: record of the first window of running text; None if there is none.
        metrics: numbers by metric name.
    """

    row: Row
    kv: KVBytes
    window: Record | None
    metrics: dict[str, Record]

    def to_dict(self) -> dict[str, Any]:
        kv: dict[str, Any] = {"bytes": self.kv.bytes, "bytes_full": self.kv.bytes_full, "share": self.kv.share}
        if self.window:
            held = [layer["held"] for layer in self.window["layers"]]
            kv["tokens_seen"] = self.window["seen"]
            kv["held"] = {"mean": sum(held) / len(held), "min": min(held), "max": max(held)}
            kv["layers"] = self.window["layers"]
        return {
            "label": self.row.label,
            "method": self.row.method,
            "budget": self.row.budget,
            "kv": kv,
            "metrics": self.metrics,
        }


@dataclass(frozen=True)
class Report:
    """A whole evaluation.

    Attributes:
        command: what was run.
        results: of the full cache, of the noise row, then of the methods.
        seconds: that the last run took; a resumed evaluation took more.
        keys: of the records that it was made of.
    """

    command: str
    settings: EvalSettings
    results: list[RowResult]
    seconds: float
    keys: frozenset[str]

    def to_dict(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "command": self.command,
            "version": __version__,
            "engine": engine_facts(),
            "machine": machine_facts(settings.n_threads),
            "model": model_facts(settings.model) | {"reference": settings.reference},
            "settings": {
                "n_ctx": settings.n_ctx,
                "budgets": list(settings.budgets),
                "methods": list(settings.methods),
                "tasks": list(settings.tasks),
                "windows": settings.windows,
                "seed": settings.seed,
                "texts": [
                    {
                        "name": text.name,
                        "sha256": hashlib.sha256(text.content.encode()).hexdigest(),
                        "characters": len(text.content),
                    }
                    for text in settings.texts
                ],
                "questions": [
                    {"name": each.name, "sha256": each.sha256, "questions": each.n_questions}
                    for each in settings.questions
                ],
            },
            "seconds": self.seconds,
            "rows": [result.to_dict() for result in self.results],
        }
