"""One evaluation, from what was asked for to the report: resumable, a window or a task's item at a time."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from depthkv_edge.assets import cache_dir
from depthkv_edge.engine.model import Model, load_model
from depthkv_edge.errors import DepthKVError
from depthkv_edge.measure.interrupt import interruptible
from depthkv_edge.measure.progress import duration
from depthkv_edge.modelfile.f32 import write_f32
from depthkv_edge.quality.estimate import tokens_per_second
from depthkv_edge.quality.eval_settings import LANGUAGE, EvalSettings
from depthkv_edge.quality.eval_table import metrics_line
from depthkv_edge.quality.language import open_window
from depthkv_edge.quality.metrics.decode import decode_speed
from depthkv_edge.quality.metrics.kl import WindowId, kl
from depthkv_edge.quality.metrics.perplexity import perplexity
from depthkv_edge.quality.metrics.prefill import prefill_speed
from depthkv_edge.quality.metrics.top1 import top1
from depthkv_edge.quality.report import Report, RowResult
from depthkv_edge.quality.rows import Row, build_rows, kv_bytes
from depthkv_edge.quality.store import Record, Store
from depthkv_edge.quality.tasks import build_tasks
from depthkv_edge.quality.tasks.task import Task
from depthkv_edge.quality.texts import windows


class Watcher(Protocol):
    """Is told how an evaluation gets on; see `depthkv_edge.measure.progress.LongWork`."""

    def begin(self, total: float) -> None:
        """Tokens to compute, without those of an earlier run."""

    def title(self, text: str) -> None:
        """What begins now."""

    def advance(self, n: float) -> None:
        """Tokens computed since the last call."""

    def say(self, line: str) -> None:
        """An estimate, or what was found: a line that stays."""


def evaluate(settings: EvalSettings, watcher: Watcher, command: str) -> Report:
    """Measure every row, and report.

    An interrupt leaves what was measured in the cache directory, and the next call with the same settings goes on
    there.

    Args:
        command: that the report names.

    Raises:
        DepthKVError: a text is too short, the engine refuses a row, a task does not fit the context, the disk is full.
    """
    started = time.perf_counter()
    with load_model(_weights(settings), settings.n_threads) as model, interruptible(model.stopping):
        rows = build_rows(model, settings.model, settings.methods, settings.budgets, settings.n_ctx, settings.seed)
        names = [name for name in settings.tasks if name != LANGUAGE]
        tasks = build_tasks(
            names,
            model,
            settings.texts,
            settings.n_ctx,
            settings.seed,
            n_items=dict(settings.n_items),
            questions=settings.questions,
        )
        evaluation = _Evaluation(settings, model, rows, tasks, watcher)
        results = evaluation.run()
        return Report(command, settings, results, time.perf_counter() - started, evaluation.keys())


def forget(settings: EvalSettings, reported: Collection[str] | None = None) -> None:
    """Remove what `evaluate` left.

    Args:
        reported: keys of records. If there are others, of an evaluation of more that was interrupted, everything stays.
            Default: all of them.
    """
    if reported is not None and not set(Store(_store_path(settings))) <= set(reported):
        return
    for path in (cache_dir() / "eval").glob(f"{settings.key()}*"):
        path.unlink(missing_ok=True)


def _store_path(settings: EvalSettings) -> Path:
    return cache_dir() / "eval" / f"{settings.key()}.jsonl"


class _Evaluation:
    """Runs what the store lacks, then reads everything from it."""

    def __init__(self, settings: EvalSettings, model: Model, rows: list[Row], tasks: Sequence[Task], watcher: Watcher):
        self.settings = settings
        self.model = model
        self.rows = rows
        self.tasks = tasks
        self.watcher = watcher
        self.store = Store(_store_path(settings))
        self.windows = self._windows() if LANGUAGE in settings.tasks else {}

    def run(self) -> list[RowResult]:
        missing = [i for i in self.windows if not all(_window_key(i, row) in self.store for row in self.rows)]
        asked = [(task, item, row) for task in self.tasks for item in range(task.n_items) for row in self.rows]
        unanswered = [ask for ask in asked if _task_key(*ask) not in self.store]
        self._begin(missing, sum(task.cost(item) for task, item, _ in unanswered))
        for i in missing:
            self._run_window(i)
        for ask in unanswered:
            self._run_item(*ask)
        return [self._result(row) for row in self.rows]

    def _windows(self) -> dict[WindowId, list[int]]:
        return {
            (i, j): tokens
            for i, text in enumerate(self.settings.texts)
            for j, tokens in enumerate(windows(self.model, text, self.settings.n_ctx, self.settings.windows))
        }

    def keys(self) -> frozenset[str]:
        """Of the records that are reported."""
        of_windows = {_window_key(i, row) for i in self.windows for row in self.rows}
        return frozenset(
            of_windows.union(
                _task_key(task, item, row) for task in self.tasks for item in range(task.n_items) for row in self.rows
            )
        )

    def _begin(self, missing: Sequence[WindowId], n_tokens_tasks: int) -> None:
        n_rows = sum(1 + len(self._missing_rows(i)) for i in missing)
        total = n_rows * self.settings.n_ctx + n_tokens_tasks
        if total:
            self.watcher.title("trying how fast this machine is")
            seconds = total / tokens_per_second(self.model, self.settings.texts[0], self.settings.n_ctx)
            self.watcher.say(f"{len(self.rows)} rows, {total:,} tokens: some {duration(seconds)}")
        self.watcher.begin(total)

    def _missing_rows(self, i: WindowId) -> list[Row]:
        """Besides the full cache, which has to run again in any case: the others are compared with it."""
        return [row for row in self.rows[1:] if _window_key(i, row) not in self.store]

    def _run_window(self, i: WindowId) -> None:
        place = f"{self.settings.texts[i[0]].name}, window {i[1] + 1} of {self.settings.windows}"
        full, missing = self.rows[0], self._missing_rows(i)
        self.watcher.title(f"{place}, {full.label}")
        directory = cache_dir() / "eval"
        with open_window(self.model, full, self.windows[i], directory, self.watcher.advance) as window:
            if _window_key(i, full) not in self.store:
                self._keep_window(i, full, window.record, place)
            for row in missing:
                self.watcher.title(f"{place}, {row.label}")
                self._keep_window(i, row, window.measure(row, self.watcher.advance), place)

    def _keep_window(self, i: WindowId, row: Row, record: Record, place: str) -> None:
        self.store[_window_key(i, row)] = record
        metrics = self._language({i: record}, {i: self.store[_window_key(i, self.rows[0])]})
        self.watcher.say(f"{place}, {row.label}: {metrics_line(metrics)}")

    def _run_item(self, task: Task, item: int, row: Row) -> None:
        place = f"{task.name} {item + 1} of {task.n_items}, {row.label}"
        self.watcher.title(place)
        record = self.store[_task_key(task, item, row)] = task.run(self.model, row, item)
        self.watcher.advance(task.cost(item))
        reference = self.store[_task_key(task, item, self.rows[0])]
        self.watcher.say(f"{place}: {metrics_line(task.columns({item: record}, {item: reference}))}")

    def _language(self, found: dict[WindowId, Record], reference: dict[WindowId, Record]) -> dict[str, Record]:
        return {
            "kl": kl(found, [text.name for text in self.settings.texts]),
            "perplexity": perplexity(found, reference),
            "top1": top1(found),
            "prefill": prefill_speed(found),
            "decode": decode_speed(found),
        }

    def _result(self, row: Row) -> RowResult:
        metrics: dict[str, Record] = {}
        found, reference = ({i: self.store[_window_key(i, r)] for i in self.windows} for r in (row, self.rows[0]))
        if self.windows:
            metrics = self._language(found, reference)
        for task in self.tasks:
            records, references = (
                {item: self.store[_task_key(task, item, r)] for item in range(task.n_items)}
                for r in (row, self.rows[0])
            )
            metrics |= task.columns(records, references)
        return RowResult(row, kv_bytes(self.model, row, self.settings.n_ctx), found.get((0, 0)), metrics)


def _window_key(i: WindowId, row: Row) -> str:
    return f"{LANGUAGE}/{i[0]}/{i[1]}/{row.method}/{row.budget}"


def _task_key(task: Task, item: int, row: Row) -> str:
    return f"{task.name}/{item}/{row.method}/{row.budget}"


def _weights(settings: EvalSettings) -> Path:
    """The file to load: the model's own, or a dequantised copy that stays until `forget`."""
    path = settings.model
    if settings.reference == "f32":
        path = cache_dir() / "eval" / f"{settings.key()}-f32.gguf"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_f32(settings.model, path)
        except OSError as error:
            raise DepthKVError(
                f"cannot write F32 weights to {path}: {error.strerror}; set XDG_CACHE_HOME to a directory with room"
            ) from None
    return path
