"""What `run` shows on standard error: a progress bar on a terminal, and one table at the end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from depthkv_edge.chat.answer import RunResult
from depthkv_edge.engine.stats import KVStats
from depthkv_edge.units import kv_share, mib


@contextlib.contextmanager
def prefill_progress(n_tokens: int) -> Iterator[Callable[[int], None]]:
    """A progress bar that disappears when the prompt is in; nothing where standard error is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    columns = TextColumn("prefill"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("prefill", total=n_tokens)
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            progress.update(task, advance=n)
            if done >= n_tokens:
                progress.stop()  # before the answer streams to the same terminal

        yield advance


def print_summary(result: RunResult) -> None:
    """The table at the end of a run."""
    console = Console(stderr=True)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in summary_rows(result):
        table.add_row(name, text)
    console.print(table, highlight=False)


def summary_rows(result: RunResult) -> list[tuple[str, str]]:
    """Rows of the table: a name, and what is to be said about it."""
    kv = result.kv
    seen = result.tokens_prompt + result.tokens_generated
    held = sum(layer.used for layer in kv.layers) / len(kv.layers) if kv.layers else seen
    rows = [
        ("tokens", f"{seen} seen, {held:.0f} held on average over the layers"),
        ("KV cache", kv_share(kv.bytes, kv.bytes_full)),
        ("memory", f"{mib(result.peak_rss_bytes)} MiB at the peak of the process"),
        ("speed", f"prefill {_rate(result.timings.prefill_tps)}, decode {_rate(result.timings.decode_tps)}"),
    ]
    if kv.active:
        rows.append(("layers", _layers(kv)))
    return rows


def _layers(kv: KVStats) -> str:
    if kv.rule == "uniform":
        reason = "the allocation rule is uniform" if kv.calibrated else "the model file carries no calibration"
        return f"all the same size: {reason}"
    cells = [layer.cells for layer in kv.layers]
    text = f"{min(cells)} to {max(cells)} cells by calibrated sensitivity ({kv.rule})"
    if kv.calibrated != kv.scorer:
        text += f"; calibrated with scorer {kv.calibrated}, not {kv.scorer}: expect less of it"
    return text


def _rate(per_second: float | None) -> str:
    return "-" if per_second is None else f"{per_second:.1f} tokens/s"
