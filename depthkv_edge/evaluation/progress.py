"""Progress of an evaluation on standard error, with the time left; nothing where that is no terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_ESTIMATE_SECONDS = 600.0  # that the speed is averaged over: rows differ


class TerminalWatcher:
    """A progress bar; see `depthkv_edge.evaluation.run.Watcher`."""

    def __init__(self) -> None:
        columns = (
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
            speed_estimate_period=_ESTIMATE_SECONDS,
        )
        self._task = self._progress.add_task("", total=None)

    def begin(self, total: int) -> None:
        self._progress.update(self._task, total=total)

    def title(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def advance(self, n_tokens: int) -> None:
        self._progress.advance(self._task, n_tokens)

    def __enter__(self) -> TerminalWatcher:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
