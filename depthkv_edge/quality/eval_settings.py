"""What is evaluated."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from depthkv_edge import __version__
from depthkv_edge.measure.facts import engine_facts
from depthkv_edge.quality.questions import QuestionSet
from depthkv_edge.quality.store import digest
from depthkv_edge.quality.texts import Text

LANGUAGE = "language"
REFERENCES = ("native", "f32")
_RECORDS = 2  # version of what records hold


@dataclass(frozen=True)
class EvalSettings:
    """What is evaluated.

    Attributes:
        model: path of a GGUF.
        texts: running text, and what tasks hide their needles in.
        n_ctx: tokens of a window, and of the full cache.
        budgets: shares of the full cache.
        methods: see `depthkv_edge.quality.rows.METHODS`.
        tasks: LANGUAGE and names of `depthkv_edge.quality.tasks.TASKS`.
        windows: of each text.
        reference: "native": the weights of the file; "f32": the same, dequantised.
        questions: that the task `qa` asks.
        n_items: of each task, where it is not the task's own number.
        seed: of everything that is drawn.
        n_threads: CPU threads.
    """

    model: Path
    texts: tuple[Text, ...]
    n_ctx: int
    budgets: tuple[float, ...]
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    windows: int = 1
    reference: str = "native"
    questions: tuple[QuestionSet, ...] = ()
    n_items: tuple[tuple[str, int], ...] = ()
    seed: int = 0
    n_threads: int = 1

    def key(self) -> str:
        """Differs whenever a record may differ."""
        stat = self.model.stat()
        facts = {
            "model": [str(self.model.resolve()), stat.st_size, stat.st_mtime_ns],
            "texts": [[text.name, hashlib.sha256(text.content.encode()).hexdigest()] for text in self.texts],
            "questions": [[each.name, each.sha256] for each in self.questions],
            "version": __version__,
            "records": _RECORDS,
            "engine": engine_facts(),
            "settings": [self.n_ctx, self.windows, self.n_items, self.reference, self.seed, self.n_threads],
        }
        return digest(facts)
