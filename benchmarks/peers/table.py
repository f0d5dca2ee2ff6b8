"""From records to the table: kvpress and ours, regime beside regime."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.peers import bounded, oneshot
from benchmarks.peers.plan import BOUNDED, FULL, KVPRESS, ONCE, Item, Plan, Retrieval, Window, record_key
from depthkv_edge.errors import DepthKVError
from depthkv_edge.quality.metrics.kl import kl
from depthkv_edge.quality.metrics.log_prob import log_prob
from depthkv_edge.quality.metrics.perplexity import perplexity
from depthkv_edge.quality.metrics.top1 import top1
from depthkv_edge.quality.store import Record

Find = Callable[[str], Record]
"""The record of a key, see `record_key`."""

_REGIMES = (KVPRESS, ONCE, BOUNDED)
_MIN_WIDTH = 150  # of a table: nothing is cut off
_TOLERANCE = 1e-3  # nats: of a token's loss in torch
_TOLERANCE_F16 = 5e-2  # .. and in the engine, whose cache is F16


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        regime: KVPRESS, ONCE or BOUNDED.
        ratio: share of the prompt that kvpress keeps, and what the line is set beside.
        budget: which of `bounded.budgets`.
    """

    regime: str
    method: str
    ratio: float
    budget: int = 0

    def share(self, item: Item) -> float:
        """What the engine's cache is of the full one; elsewhere the keep ratio."""
        if self.regime != BOUNDED or self.method == FULL:
            return self.ratio
        return bounded.budgets(item, self.ratio)[self.budget]

    def records(self, items: Sequence[Item], find: Find) -> list[Record]:
        return [find(record_key(item, self.regime, self.method, self.share(item))) for item in items]


def lines(plan: Plan, n_budgets: int) -> Iterator[Line]:
    """Full caches first, then everything at each ratio.

    Args:
        n_budgets: how many of `bounded.budgets` the items have.
    """
    for regime in _REGIMES:
        yield Line(regime, FULL, 1.0)
    for ratio in plan.ratios:
        yield from (Line(KVPRESS, method, ratio) for method in plan.presses)
        yield from (Line(ONCE, method, ratio) for method in oneshot.METHODS)
        for i in range(n_budgets):
            yield from (Line(BOUNDED, method, ratio, i) for method in bounded.METHODS)


def build_report(plan: Plan, find: Find) -> dict[str, Any]:
    """JSON-able: `windows` and `retrievals`, each a list of lines, and `checks`.

    Raises:
        DepthKVError: the full caches of the three implementations do not agree.
    """
    report: dict[str, Any] = {"checks": _agreement(plan, find)}
    if plan.windows:
        report["windows"] = [_line(line, plan, plan.windows, find) for line in lines(plan, 2)]
    if plan.retrievals:
        report["retrievals"] = [_line(line, plan, plan.retrievals, find) for line in lines(plan, 1)]
    return report


def _line(line: Line, plan: Plan, items: Sequence[Item], find: Find) -> dict[str, Any]:
    found, full = line.records(items, find), Line(line.regime, FULL, 1.0).records(items, find)
    measure = _language if isinstance(items[0], Window) else _answers
    return {
        "regime": line.regime,
        "method": line.method,
        "ratio": line.ratio,
        "budget": line.share(items[0]),
        "kv": _kv(found, items, plan),
        "metrics": measure(items, found, full),
    }


def _language(items: Sequence[Window], found: Sequence[Record], full: Sequence[Record]) -> dict[str, Any]:
    titles = list(dict.fromkeys(item.text for item in items))
    ids = [(titles.index(item.text), i) for i, item in enumerate(items)]
    windows, reference = (dict(zip(ids, some, strict=True)) for some in (found, full))
    return {"kl": kl(windows, titles), "perplexity": perplexity(windows, reference), "top1": top1(windows)}


def _answers(items: Sequence[Retrieval], found: Sequence[Record], full: Sequence[Record]) -> dict[str, Any]:
    metrics: dict[str, list[Record]] = {}
    for item, record in zip(items, found, strict=True):
        for i, question in enumerate(item.questions):
            answer = {name: [record[name][i]] for name in ("log_prob", "exact")}
            metrics.setdefault(question.metric, []).append(answer)
    return {metric: log_prob(answers) for metric, answers in metrics.items()}


def _kv(found: Sequence[Record], items: Sequence[Item], plan: Plan) -> dict[str, Any]:
    """Means over the items; bytes as F16, whatever the implementation computes in."""
    held = np.mean([record["cells"]["held"] for record in found], axis=0)
    full = float(np.mean([item.n_prompt + item.n_tail for item in items])) * plan.n_layers * plan.cell_bytes
    moments = {
        name: float(np.mean([record["cells"][name] for record in found])) * plan.cell_bytes
        for name in ("peak", "prompt", "end")
    }
    return {
        "held": {name: float(getattr(held, name)()) for name in ("mean", "min", "max")} | {"layers": held.tolist()},
        "bytes": moments,
        "share": {name: value / full for name, value in moments.items()},
    }


def _agreement(plan: Plan, find: Find) -> dict[str, float]:
    """How far lines are from each other that should be the same but for rounding.

    Returns:
        Root mean square difference of a token's loss, nats.

    Raises:
        DepthKVError: one is more than rounding.
    """
    full = Line(KVPRESS, FULL, 1.0)
    pairs = {
        "full cache, torch of both environments": (full, Line(ONCE, FULL, 1.0), _TOLERANCE),
        "full cache, torch and engine": (full, Line(BOUNDED, FULL, 1.0), _TOLERANCE_F16),
    }
    if "StreamingLLM" in plan.presses:  # which keeps the very tokens that our streaming does
        for ratio in plan.ratios:
            ours, theirs = Line(ONCE, "streaming", ratio), Line(KVPRESS, "StreamingLLM", ratio)
            pairs[f"streaming at {ratio:g}, kvpress and ours"] = theirs, ours, _TOLERANCE
    found = {}
    for name, (a, b, tolerance) in pairs.items() if plan.windows else ():
        losses = zip(a.records(plan.windows, find), b.records(plan.windows, find), strict=True)
        differences = np.concatenate([np.subtract(one["nll"], other["nll"]) for one, other in losses])
        found[name] = math.sqrt(float(np.mean(differences**2)))
        if not found[name] <= tolerance:
            raise DepthKVError(
                f"{name}: a token's loss differs by {found[name]:.1e} nats (root mean square); at most {tolerance:g} "
                "is rounding: they do not run the same model on the same tokens"
            )
    return found


# --- the terminal ---------------------------------------------------------------------------------------------------


def print_report(report: Mapping[str, Any]) -> None:
    """Print what `build_report` made, with the facts that the command adds, on standard output."""
    console = Console(width=max(_MIN_WIDTH, Console().width))
    settings = report["settings"]
    model, versions = report["model"], report["versions"]
    console.print(f"{model['name']}, F32 weights (dequantised), kvpress {versions['kvpress']}", highlight=False)
    if "windows" in report:
        n_prompt, n_tail = settings["prompt_tokens"], settings["tail_tokens"]
        console.print(f"\nRunning text: {n_prompt} tokens of prompt, then {n_tail} predicted", highlight=False)
        names = "KL, nats (95 %)", "perplexity\nratio", "top-1\n%"
        console.print(_table(report["windows"], names, _language_cells))
    if "retrievals" in report:
        console.print(
            f"\nA pass key and {settings['keys']} named keys, each asked for after the context", highlight=False
        )
        names = "keys: log p (95 %)", "exact\n%", "pass key:\nlog p", "exact\n%"
        console.print(_table(report["retrievals"], names, _answer_cells))
    for line in _notes(report):
        console.print(line, style="dim", highlight=False)


def _table(
    rows: Sequence[dict[str, Any]], names: Sequence[str], cells: Callable[[dict[str, Any]], tuple[str, ...]]
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("keep", "method", "evicts"):
        table.add_column(name, no_wrap=True)
    memory = "held after\nthe prompt", "KV MiB: peak,\nprompt, end", "of\nfull"
    for name in (*memory, *names):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        held, kv = row["kv"]["held"], row["kv"]["bytes"]
        table.add_row(
            f"{row['ratio']:g}",
            f"kvpress {row['method']}" if row["regime"] == KVPRESS else f"ours {row['method']}",
            _evicts(row),
            f"{held['mean']:.0f} ({held['min']:.0f}-{held['max']:.0f})",
            "  ".join(f"{kv[name] / 2**20:.1f}" for name in ("peak", "prompt", "end")),
            f"{row['kv']['share']['end']:.2f}",
            *cells(row["metrics"]),
            end_section=i + 1 < len(rows) and rows[i + 1]["ratio"] != row["ratio"],
        )
    return table


def _evicts(row: Mapping[str, Any]) -> str:
    if row["method"] == FULL:
        return "engine" if row["regime"] == BOUNDED else "torch"
    if row["regime"] == BOUNDED:
        return f"bounded {row['budget']:.2f}"
    return "once"


def _language_cells(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    divergence = metrics["kl"]
    return (
        f"{_small(divergence['mean'])} ({_small(divergence['low'])}-{_small(divergence['high'])})",
        f"{metrics['perplexity']['ratio']:.3f}",
        f"{100 * metrics['top1']['share']:.1f}",
    )


def _answer_cells(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    keys, pass_key = metrics["multikey"], metrics["passkey"]
    return (
        f"{keys['log_prob']:.2f} ({keys['low']:.2f} - {keys['high']:.2f})",
        f"{100 * keys['exact']:.0f}",
        f"{pass_key['log_prob']:.2f}",
        f"{100 * pass_key['exact']:.0f}",
    )


def _small(value: float) -> str:
    return f"{value:.4f}" if value >= 0.00095 or value == 0 else f"{value:.0e}"


def _notes(report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "once: the whole prompt in one pass, every layer shrinks once right after its attention, then the cache grows; "
        "the pass needs its activations for all tokens of the prompt at once, on top of the KV."
    )
    yield (
        "bounded b: in the engine, b of the full cache from the first token to the last; the larger b of a ratio has "
        "the bytes that the others end with. Each is compared with the full cache of its own implementation."
    )
    yield (
        "KV as F16; of full: at the end, against the cache of all tokens. held: tokens of a layer, mean (min-max); "
        "kvpress chooses them for each KV head."
    )
    rows = [*report.get("windows", ()), *report.get("retrievals", ())]
    equal = sorted({row["ratio"] for row in rows if row["method"] == "PyramidKV" and not _uneven(row["kv"]["held"])})
    if equal:
        yield (
            f"PyramidKV at {', '.join(f'{ratio:g}' for ratio in equal)}: its smallest layer would be below its window, "
            "so kvpress falls back to equal layers: SnapKV, but for how the number of tokens is rounded."
        )
    if checks := report.get("checks"):
        yield "checked, differences: " + "; ".join(f"{name}: {value:.1e}" for name, value in checks.items())


def _uneven(held: Mapping[str, float]) -> bool:
    return held["max"] > held["min"] + 1
