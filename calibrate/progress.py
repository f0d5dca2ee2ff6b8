"""How far a calibration is, on standard error, where that is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress(name: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar with the time left. It disappears at the end; nothing is shown where standard error is no terminal.

    Args:
        total: units of work.
    """
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    columns = TextColumn(name), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(True)
    # half an hour of samples: layers cost less and less, a short average would promise too much
    bar = Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=1800)
    with bar:
        task = bar.add_task(name, total=total)
        yield lambda n: bar.advance(task, n)
