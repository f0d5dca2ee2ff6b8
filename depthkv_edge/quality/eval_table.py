"""The report on a terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from depthkv_edge.units import mib

Row = dict[str, Any]

_MIN_WIDTH = 120  # of a table that is not read on a terminal

_PROBES = {
    "multikey": "keys",
    "passkey": "pass key",
    "variables": "variables",
    "words": "common\nwords",
    "instruction_pinned": "instruction\npinned",
    "instruction_unpinned": "instruction\nnot pinned",
}


def print_report(report: dict[str, Any]) -> None:
    """Print a report (see `depthkv_edge.quality.report.Report.to_dict`) on standard output."""
    console = Console(width=None if sys.stdout.isatty() else _MIN_WIDTH)
    model, settings = report["model"], report["settings"]
    weights = "F32 weights (dequantised)" if model["reference"] == "f32" else f"{model['weights']} weights"
    console.print(f"{model['name']}, {weights}, context {settings['n_ctx']}, {_texts(settings)}", highlight=False)
    for table in (_held(report["rows"]), _asked(report["rows"]), _quizzed(report["rows"]), _generated(report["rows"])):
        if table:
            console.print(table)
    for line in _notes(report):
        console.print(line, style="dim", highlight=False)


def _texts(settings: dict[str, Any]) -> str:
    names = ", ".join(text["name"] for text in settings["texts"])
    return f"{settings['windows']} x {names}" if settings["windows"] > 1 else names


def metrics_line(metrics: dict[str, Any]) -> str:
    """One line of what was found of a row."""
    asked = {name.replace("_", " "): _answers(metrics.get(name)) for name in _PROBES}
    parts = {
        "KL": _kl(metrics.get("kl")),
        "top-1 %": _percent(metrics.get("top1"), "share"),
        "prefill": _format(metrics.get("prefill"), "ratio", ".2f"),
        "decode": _format(metrics.get("decode"), "ratio", ".2f"),
        **asked,
        "QA F1": _format(metrics.get("qa"), "f1", ".2f"),
        "QA log-probability": _format(metrics.get("qa"), "log_prob", ".2f"),
        "greedy %": _percent(metrics.get("greedy"), "agreement"),
        "summary ROUGE-1": _format(metrics.get("summary"), "rouge1", ".2f"),
    }
    return "; ".join(f"{name} {text}" for name, text in parts.items() if text)


def _held(rows: list[Row]) -> Table:
    """Memory, and running text."""
    columns = "KV\nMiB", "of\nfull", "tokens held,\nmean (min-max)", "KL, nats\n(95 %)", "perplexity\nratio"
    table = _table(*columns, "top-1\n%", "prefill\nratio", "decode\nratio")
    for row in rows:
        kv, metrics = row["kv"], row["metrics"]
        held = kv.get("held")
        table.add_row(
            row["label"],
            mib(kv["bytes"]),
            f"{kv['share']:.2f}",
            f"{held['mean']:.0f} ({held['min']}-{held['max']})" if held else "",
            _kl(metrics.get("kl")),
            _format(metrics.get("perplexity"), "ratio", ".3f"),
            _percent(metrics.get("top1"), "share"),
            _format(metrics.get("prefill"), "ratio", ".2f"),
            _format(metrics.get("decode"), "ratio", ".2f"),
        )
    return table


def _asked(rows: list[Row]) -> Table | None:
    """Questions after the context; None if there were none."""
    probes = {name: title for name, title in _PROBES.items() if any(name in row["metrics"] for row in rows)}
    table = _table(*probes.values())
    for row in rows:
        table.add_row(row["label"], *(_answers(row["metrics"].get(name)) for name in probes))
    return table if probes else None


def _quizzed(rows: list[Row]) -> Table | None:
    """Questions of a set, paired with the full cache's answers; None if there were none."""
    if not any("qa" in row["metrics"] for row in rows):
        return None
    table = _table("QA F1", "of\nfull", "change of F1\n(95 %)", "exact\n%", "log-prob.,\nnats", "its change\n(95 %)")
    for row in rows:
        qa = row["metrics"].get("qa")
        table.add_row(
            row["label"],
            _format(qa, "f1", ".3f"),
            _percent(qa, "f1_share"),
            _change(qa, "f1_change", ".3f"),
            _percent(qa, "exact"),
            _format(qa, "log_prob", ".2f"),
            _change(qa, "log_prob_change", ".2f"),
        )
    return table


def _generated(rows: list[Row]) -> Table | None:
    """Generated text against the full cache's; None if there is none."""
    if not any(name in row["metrics"] for row in rows for name in ("greedy", "summary")):
        return None
    table = _table("greedy tokens\nthat agree, %", "first that\ndiffers", "summary\nROUGE-1", "summary\nROUGE-L")
    for row in rows:
        greedy, summary = (row["metrics"].get(name) for name in ("greedy", "summary"))
        table.add_row(
            row["label"],
            _percent(greedy, "agreement"),
            _format(greedy, "first_difference", ".0f"),
            _format(summary, "rouge1", ".2f"),
            _format(summary, "rougeL", ".2f"),
        )
    return table


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("row", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", overflow="fold")
    return table


def _notes(report: dict[str, Any]) -> list[str]:
    notes = [
        "KV of full: the whole F16 cache. noise: the full cache with another batch size and attention kernel, which "
        "should not matter.",
        "prefill ratio: speed in the first half of the window, against full; decode ratio: at its end.",
    ]
    if any(name in row["metrics"] for row in report["rows"] for name in _PROBES):
        notes.append(
            "Answers: log-probability of the whole right answer in nats, share that is exact. Questions come after the "
            "context, and are not seen while tokens are evicted."
        )
    qa = next((row["metrics"]["qa"] for row in report["rows"] if "qa" in row["metrics"]), None)
    if qa:
        notes.append(
            f"QA: {qa['n']} questions on {qa['documents']} documents, asked after each, from the state that reading it "
            "left; intervals are over documents."
        )
    return notes


def _kl(metric: Row | None) -> str:
    return f"{_small(metric['mean'])} ({_small(metric['low'])}-{_small(metric['high'])})" if metric else ""


def _small(value: float) -> str:
    return f"{value:.4f}" if value >= 0.00095 or value == 0 else f"{value:.0e}"


def _answers(metric: Row | None) -> str:
    return f"{metric['log_prob']:.1f}, {metric['exact']:.0%}" if metric else ""


def _change(metric: Row | None, name: str, form: str) -> str:
    if not metric:
        return ""
    value, low, high = (format(metric[name + end], "+" + form) for end in ("", "_low", "_high"))
    return f"{value} ({low} {high})"


def _percent(metric: Row | None, name: str) -> str:
    return f"{100 * metric[name]:.1f}" if metric else ""


def _format(metric: Row | None, name: str, form: str) -> str:
    return format(metric[name], form) if metric else ""
