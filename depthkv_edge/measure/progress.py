"""How far long work is, on standard error: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 60.0  # between two lines where there is no terminal


class LongWork:
    """Shows how far a piece of work is, for as long as it is a context.

    Args:
        title: what begins.
        average_seconds: that the speed is averaged over: steps differ.
    """

    def __init__(self, title: str = "", average_seconds: float = 600.0):
        self._title = title
        self._total: float | None = None
        self._done = 0.0
        self._started = self._begun = time.monotonic()
        self._over = threading.Event()
        self._lines = threading.Thread(target=self._write_lines, daemon=True)
        columns = (
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        console = Console(stderr=True)
        self._is_terminal = sys.stderr.isatty() and not console.is_dumb_terminal
        self._bar = Progress(
            *columns,
            console=console,
            transient=True,
            disable=not self._is_terminal,
            speed_estimate_period=average_seconds,
        )
        self._task = self._bar.add_task(title, total=None)

    def begin(self, total: float) -> None:
        """Units of work to do, from now on."""
        self._begun = time.monotonic()
        self._total = total
        self._bar.update(self._task, total=total)

    def title(self, text: str) -> None:
        """What begins now."""
        self._title = text
        self._bar.update(self._task, description=text)

    def advance(self, n: float) -> None:
        """Units of work done since the last call."""
        self._done += n
        self._bar.advance(self._task, n)

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._is_terminal:
            self._bar.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
        else:
            click.echo(line, err=True)

    def __enter__(self) -> LongWork:
        self._started = time.monotonic()
        self._bar.start()
        if not self._is_terminal:
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._bar.stop()

    def _write_lines(self) -> None:
        while not self._over.wait(LINE_SECONDS):
            self.say(self._line())

    def _line(self) -> str:
        now = time.monotonic()
        text = f"{self._title}: {duration(now - self._started)}"
        if not self._total or not self._done:
            return text
        share = min(1.0, self._done / self._total)
        return f"{text}, {share:.0%} done, {duration((now - self._begun) * (1 - share) / share)} left"


@contextlib.contextmanager
def progress(title: str, total: float, average_seconds: float = 600.0) -> Iterator[Callable[[float], None]]:
    """Work of a known size, from its beginning to its end: call what this gives with the units done."""
    with LongWork(title, average_seconds) as work:
        work.begin(total)
        yield work.advance


def duration(seconds: float) -> str:
    """Rounded to what a person who waits wants to know."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
