"""What `bench` shows: tables on standard output."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from depthkv_edge.speed.process import NO_BUDGET, STOCK
from depthkv_edge.speed.result import BenchResult, BenchRow, PairRatio
from depthkv_edge.speed.schedule import DEPTHS
from depthkv_edge.speed.timing import Speed
from depthkv_edge.units import mib


def print_result(result: BenchResult) -> None:
    """Facts, and tables of sizes, speeds and ratios, on standard output."""
    console = Console(highlight=False)
    for name, text in fact_rows(result):
        # not a table: a path that is wrapped cannot be copied
        console.print(Text.assemble((f"{name:<13}", "bold"), text), soft_wrap=True)
    console.print()
    console.print(_sizes(result.rows))
    console.print()
    console.print(_speeds(result.rows))
    console.print()
    n = result.rows[0].latency["full"].n
    console.print(f"Milliseconds that single tokens take when the context is full, of {n} decoded:")
    console.print(_latencies(result.rows))
    console.print()
    same = "" if result.baseline is None else f"; {NO_BUDGET}: to {STOCK}"
    console.print(
        f"Ratio to the faster stock setting of each column{same}. Median and range over n turns, taken side by side:"
    )
    console.print(_ratios(result.rows))


def fact_rows(result: BenchResult) -> list[tuple[str, str]]:
    """Rows above the tables: a name, and what is to be said about it."""
    settings, machine, stock = result.settings, result.machine, result.rows[0]
    rows = [
        ("model", f"{result.model['name']} ({result.model['file']})"),
        ("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"),
        ("context", f"{settings['n_ctx']} tokens, the long prompt {settings['prompt_tokens']} of them"),
        ("stock", _stock(result)),
    ]
    if result.baseline is not None:
        rows.append(("no budget", _no_budget(result)))
    rows += [
        ("layers", _layers(result)),
        ("prefill", f"n = {stock.prefill.against.n} parts of the long prompt, equally deep on average"),
        ("its end", f"n = {stock.prefill_full.against.n} parts at the end of it"),
        ("decode", f"n = {stock.decode['full'].against.n} runs of {settings['decode_tokens']} tokens at each depth"),
        ("took", _minutes(result.seconds)),
    ]
    return rows


def _stock(result: BenchResult) -> str:
    if result.baseline is None:
        return (
            "this library without a budget stands in for an unpatched build: give one with --baseline "
            "(scripts/build-baseline.sh builds it)"
        )
    if result.baseline.is_patched:
        return f"{result.baseline.directory}, which is not an unpatched build: it has this library's patches"
    return f"unpatched build in {result.baseline.directory}"


def _no_budget(result: BenchResult) -> str:
    assert result.baseline is not None
    same = "bit-identical to" if result.baseline.identical_logits else "NOT those of"
    ratios = f"prefill {_ratio(result.baseline.prefill)}, decode {_ratio(result.baseline.decode)}"
    n = result.baseline.prefill.n
    return f"logits {same} the baseline's; {ratios} of its speed, over {n} pairs of fresh processes"


def _layers(result: BenchResult) -> str:
    rule = next(row.facts.rule for row in result.rows if row.configuration.budget is not None)
    if result.model["calibration"] is None:
        return f"all the same size under a budget (rule {rule}): the model file carries no calibration"
    if rule == "uniform":
        return "all the same size under a budget: the calibrated model's own rule is uniform"
    return f"sized by calibrated sensitivity under a budget (the model's rule, {rule})"


def _sizes(rows: tuple[BenchRow, ...]) -> Table:
    table = _table("MiB", "KV", "of full", "compute", "scorer", "peak", "evicting")
    for row in rows:
        table.add_row(
            row.configuration.label,
            mib(row.kv_bytes),
            f"{row.kv_share:.1%}",
            mib(row.facts.compute_bytes),
            mib(row.facts.scorer_bytes) if row.facts.scorer_bytes else "-",
            mib(row.facts.peak_rss_bytes),
            f"{row.evict_share:.1%}" if row.configuration.budget is not None else "-",
        )
    return table


_COLUMNS = ("prefill", "its end", *DEPTHS)


def _quantities(row: BenchRow) -> list[Speed]:
    return [row.prefill, row.prefill_full, *(row.decode[depth] for depth in DEPTHS)]


def _speeds(rows: tuple[BenchRow, ...]) -> Table:
    table = _table("tokens/s", *_COLUMNS, "1st token")
    for row in rows:
        speeds = (f"{speed.tokens_per_second:.1f}" for speed in _quantities(row))
        table.add_row(row.configuration.label, *speeds, f"{row.first_token_seconds:.1f} s")
    return table


def _latencies(rows: tuple[BenchRow, ...]) -> Table:
    table = _table("ms", "p50", "p99", "maximum", "of p50")
    for row in rows:
        latency = row.latency["full"]
        cells = (f"{1e3 * seconds:.1f}" for seconds in (latency.p50, latency.p99, latency.max))
        table.add_row(row.configuration.label, *cells, f"{latency.max / latency.p50:.2f}x")
    return table


def _ratios(rows: tuple[BenchRow, ...]) -> Table:
    table = _table("", *_COLUMNS)
    for row in rows:
        ratios = [speed.against for speed in _quantities(row)]
        cells = (
            "1" if ratio.against == row.configuration.label else f"{ratio.ratio:.2f}\n{ratio.low:.2f}-{ratio.high:.2f}"
            for ratio in ratios
        )
        table.add_row(row.configuration.label, *cells)
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _ratio(ratio: PairRatio) -> str:
    return f"{ratio.ratio:.3f}x (95 % between {ratio.interval[0]:.3f} and {ratio.interval[1]:.3f})"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
