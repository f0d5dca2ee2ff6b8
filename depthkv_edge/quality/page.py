"""A report as one self-contained page: verdict, plots and tables, and how all of it was measured."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from depthkv_edge.errors import DepthKVError
from depthkv_edge.quality.canvas import COLOURS, INSTALL, NARROW, WIDE
from depthkv_edge.quality.plots import plots_of
from depthkv_edge.quality.rows import FULL, METHODS, NOISE
from depthkv_edge.quality.typeset import count, duration, fixed, is_number, mib, nats, percent, small
from depthkv_edge.quality.verdict import front, verdict

Report = dict[str, Any]
Row = dict[str, Any]

_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(report: Report, path: Path) -> None:
    """Write the page of a report (see `depthkv_edge.quality.report.Report.to_dict`) in one step.

    Raises:
        DepthKVError: a package is missing, or the file cannot be written.
    """
    page = render_page(report)
    path = Path(os.path.realpath(path))  # the target of a link is replaced, not the link
    temporary = path.with_name(f"{path.name}.part")
    try:
        try:
            temporary.write_text(page, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DepthKVError(f"cannot write {path}: {error.strerror}; choose another path") from error


def render_page(report: Report) -> str:
    """The page as text.

    Raises:
        DepthKVError: a package is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup, escape
    except ImportError:
        raise DepthKVError(f"cannot write a page: jinja2 is not installed; run `{INSTALL}`") from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = report["rows"]
    labels = sorted((str(escape(row["label"])) for row in rows[2:]), key=len, reverse=True)
    names = re.compile("|".join(map(re.escape, labels)) or "(?!)")
    environment.filters["rows_named"] = lambda text: Markup(names.sub(r"<strong>\g<0></strong>", str(escape(text))))
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        colours=COLOURS,
        verdict=verdict(report),
        figures=[
            {"plot": plot, "narrow": plot.svg(NARROW), "wide": plot.svg(WIDE), "alt": _alt(plot.title, report)}
            for plot in plots_of(report)
        ],
        headline=_table("All rows", _HEADLINE_CAPTION, _HEADLINE, rows, {row["label"] for row in front(rows[2:])}),
        tables=[table for table in (_table("Other tasks", _TASKS_CAPTION, _TASKS, rows), _by_text(rows)) if table],
        methods=list(_methods(rows)),
        terms=[(term, text, _samples(rows, metric)) for metric, term, text in _TERMS if _samples(rows, metric)],
        facts=list(_facts(report)),
        texts=[(text["name"], count(text["characters"]), text["sha256"][:16]) for text in report["settings"]["texts"]],
    )


def _alt(title: str, report: Report) -> str:
    labels = ", ".join(dict.fromkeys(row["method"] for row in report["rows"][2:]))
    return f"{title}, for {labels}. The numbers are in the tables."


# tables


@dataclass(frozen=True)
class _Cell:
    """A number, and what is said about it in a second line."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class _Column:
    """One column: columns of the same group share a heading above their own."""

    group: str
    name: str
    cell: Callable[[Row], _Cell | None]


@dataclass(frozen=True)
class _Table:
    """A table without the columns that have nothing to show.

    Attributes:
        caption: how it is read.
        groups: headings and how many columns each spans.
        columns: second headings.
        rows: method, budget, whether the row is strong, and its cells; a missing one is None.
    """

    title: str
    caption: str
    groups: list[tuple[str, int]]
    columns: list[str]
    rows: list[tuple[str, str, bool, list[_Cell | None]]]


def _table(
    title: str, caption: str, columns: Sequence[_Column], rows: Sequence[Row], strong: Collection[str] = ()
) -> _Table | None:
    """None if there is nothing to show."""
    shown = [column for column in columns if any(column.cell(row) for row in rows)]
    if not shown:
        return None
    return _Table(
        title,
        caption,
        [(group, len(list(members))) for group, members in groupby(column.group for column in shown)],
        [column.name for column in shown],
        [(*_split(row), row["label"] in strong, [column.cell(row) for column in shown]) for row in rows],
    )


def _split(row: Row) -> tuple[str, str]:
    """The label in two parts: a phone may break it between them only."""
    method = row["method"]
    return (method, row["label"].removeprefix(method)) if row["label"].startswith(method) else (row["label"], "")


def _by_text(rows: Sequence[Row]) -> _Table | None:
    names = dict.fromkeys(name for row in rows for name in row["metrics"].get("kl", {}).get("by_text", {}))
    columns = [_Column("KL divergence, nats per token", name, _text_cell(name)) for name in names]
    return _table("KL divergence by text", "Texts differ in what they lose; the mean above is over all.", columns, rows)


def _text_cell(name: str) -> Callable[[Row], _Cell | None]:
    def cell(row: Row) -> _Cell | None:
        value = row["metrics"].get("kl", {}).get("by_text", {}).get(name)
        return _Cell(small(value)) if is_number(value) else None

    return cell


def _number(metric: str, name: str, form: Callable[[float], str], *, interval: bool = False) -> Any:
    """A cell with one number of a metric, and its interval below."""

    def cell(row: Row) -> _Cell | None:
        found = row["metrics"].get(metric, {})
        if not is_number(found.get(name)):
            return None
        bounds = [found.get("low"), found.get("high")] if interval else []
        shown = bool(bounds) and all(map(is_number, bounds)) and bounds[0] != bounds[1]
        return _Cell(form(found[name]), f"{form(bounds[0])} to {form(bounds[1])}" if shown else "")

    return cell


def _change(metric: str, name: str) -> Any:
    """A cell with a difference from the full cache, in nats, and its interval below."""

    def cell(row: Row) -> _Cell | None:
        found = [row["metrics"].get(metric, {}).get(name + end) for end in ("", "_low", "_high")]
        if not all(map(is_number, found)):
            return None
        value, low, high = found
        return _Cell(nats(value), f"{nats(low)} to {nats(high)}" if low != high else "")

    return cell


def _held(row: Row) -> _Cell | None:
    held = row["kv"].get("held")
    if held is None:
        return None
    spread = f"{count(held['min'])} to {count(held['max'])}" if held["min"] != held["max"] else ""
    return _Cell(f"{count(held['mean'])} of {count(row['kv']['tokens_seen'])}", spread)


def _answers(title: str, metric: str) -> list[_Column]:
    return [
        _Column(title, "log-prob., nats", _number(metric, "log_prob", nats, interval=True)),
        _Column(title, "exact", _number(metric, "exact", percent)),
    ]


_HEADLINE_CAPTION = (
    "Bold: no other row is both as small and as close to the full cache. In the second line of a cell: the 95 % "
    "interval; of tokens held (mean), the fewest and the most; of speed, the range over the windows."
)
_HEADLINE = [
    _Column("KV cache", "MiB", lambda row: _Cell(fixed(row["kv"]["bytes"] / 2**20, 1))),
    _Column("KV cache", "of full", lambda row: _Cell(percent(row["kv"]["share"]))),
    _Column("Tokens", "held by a layer, of seen", _held),
    _Column("KL divergence", "nats per token", _number("kl", "mean", small, interval=True)),
    _Column("Perplexity", "ratio to full", _number("perplexity", "ratio", lambda value: fixed(value, 4))),
    _Column("Top-1", "agreement", _number("top1", "share", lambda value: percent(value, 1))),
    *_answers("Multi-key", "multikey"),
    *_answers("Passkey", "passkey"),
    _Column(
        "Prefill speed", "ratio to full", _number("prefill", "ratio", lambda value: fixed(value, 2), interval=True)
    ),
    _Column("Decode speed", "ratio to full", _number("decode", "ratio", lambda value: fixed(value, 2), interval=True)),
    _Column("Decode speed", "tokens/s", _number("decode", "tokens_per_second", lambda value: fixed(value, 1))),
]
_TASKS_CAPTION = "In the second line of a cell: the 95 % interval."
_TASKS = [
    _Column("Questions", "F1", _number("qa", "f1", lambda value: fixed(value, 3))),
    _Column("Questions", "F1, of full", _number("qa", "f1_share", percent)),
    _Column("Questions", "exact", _number("qa", "exact", percent)),
    _Column("Questions", "log-prob., nats", _number("qa", "log_prob", nats)),
    _Column("Questions", "change of it", _change("qa", "log_prob_change")),
    *_answers("Variables", "variables"),
    *_answers("Common words", "words"),
    *_answers("Instruction, pinned", "instruction_pinned"),
    *_answers("Instruction, not pinned", "instruction_unpinned"),
    _Column("Greedy text", "agreement", _number("greedy", "agreement", percent)),
    _Column("Greedy text", "same for, tokens", _number("greedy", "first_difference", lambda value: fixed(value, 1))),
    _Column("Summary", "ROUGE-1", _number("summary", "rouge1", lambda value: fixed(value, 2))),
    _Column("Summary", "ROUGE-L", _number("summary", "rougeL", lambda value: fixed(value, 2))),
]


# what the words mean

_TERMS = [
    (
        "kl",
        "KL divergence",
        "of a row's predictions from the full cache's, over the second half of every window; 95 % bootstrap interval, "
        "which covers the tokens that were read and says nothing of other texts",
    ),
    ("perplexity", "Perplexity", "of the text, as a ratio to the full cache's: 1 is no loss"),
    ("top1", "Top-1 agreement", "share of tokens whose most likely successor is the full cache's"),
    (
        "multikey",
        "Multi-key",
        "one of several numbers hidden in a text. The question comes after the context, unseen while tokens are "
        "evicted; log-probability of the whole right answer, and how often each of its tokens is the most likely one "
        "(exact)",
    ),
    ("passkey", "Passkey", "the same with a single hidden number"),
    (
        "prefill",
        "Prefill speed",
        "tokens per second in the first half of a window, one row after another, what they do to make room "
        "included; median, and the range over the windows",
    ),
    (
        "decode",
        "Decode speed",
        "tokens per second at the end of a window, in turns with the full cache; median, and the range over the "
        "windows",
    ),
    (
        "qa",
        "Questions",
        "with known answers, after a document that holds them, unseen while tokens are evicted: words shared with the "
        "answer (F1), the same words (exact), log-probability of the answer; the interval is over documents",
    ),
    ("variables", "Variables", "chains of assignments in a text, one of which is asked for; as multi-key"),
    ("words", "Common words", "the most frequent words of a list; as multi-key"),
    ("instruction_pinned", "Instruction, pinned", "a system prompt that eviction must not touch is still followed"),
    ("instruction_unpinned", "Instruction, not pinned", "the same where it may be evicted"),
    (
        "greedy",
        "Greedy text",
        "share of generated tokens that equal the full cache's at the same place, and how many come before the first "
        "difference",
    ),
    ("summary", "Summary", "of a long text: ROUGE F-measure against the full cache's summary, 1 is the same words"),
]


def _samples(rows: Sequence[Row], metric: str) -> str:
    """How many, such as "20"; "" for a metric that no row has."""
    found = sorted({row["metrics"][metric]["n"] for row in rows if metric in row["metrics"]})
    return " to ".join(dict.fromkeys(count(n) for n in (found[0], found[-1]))) if found else ""


def _methods(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    for method in dict.fromkeys(row["method"] for row in rows):
        if method == FULL:
            yield method, "stock llama.cpp, every token, K and V in F16; what all rows are compared with"
        elif method == NOISE:
            yield (
                method,
                "the full cache, computed in batches of another size by another attention kernel, which should not "
                "matter: differences of this size mean nothing",
            )
        else:
            base, _, kv_type = method.partition("+kv-")
            yield method, METHODS.get(base, "") + (f"; K and V in {kv_type}" if kv_type else "")


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    model, settings, machine, engine = (report[name] for name in ("model", "settings", "machine", "engine"))
    weights = model["weights"] or "unknown type"
    parts = [model["file"], mib(model["bytes"]), model["architecture"], f"weights {weights}"]
    yield "Model", ", ".join(filter(None, parts))
    yield (
        "Computed with",
        "these weights dequantised to F32: the rule itself, without the noise of quantised activations"
        if model["reference"] == "f32"
        else "these weights: the product as it is, with the noise of quantised activations",
    )
    yield "Calibration", _calibration(model["calibration"])
    windows = settings["windows"]
    yield "Context", f"{count(settings['n_ctx'])} tokens, {windows} window{'s' * (windows != 1)} of each text"
    yield "Seed", str(settings["seed"])
    yield "Versions", f"depthkv-edge {report['version']}, llama-cpp-python {engine['llama_cpp_python']}"
    yield "Engine", f"llama.cpp {engine['llama_cpp_commit']}, library sha256 {engine['library_sha256'][:16]}"
    cores = f"{machine['cores']} cores, {machine['threads']} threads used"
    memory = f"{machine['memory_bytes'] / 2**30:.1f}\N{NO-BREAK SPACE}GiB of memory"
    yield "Machine", ", ".join(filter(None, [machine["processor"], cores, memory, machine["system"]]))
    yield "Time", duration(report["seconds"])


def _calibration(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return "none: layers are equal in size"
    parts = [f"method {calibration['method']}" if calibration["method"] else "", calibration["corpus"]]
    if is_number(calibration["stability"]):
        parts.append(f"rank correlation between texts {fixed(calibration['stability'], 2)}")
    if is_number(calibration["gain"]):
        parts.append(f"held-out KL divergence {fixed(calibration['gain'], 1)} times lower than uniform's")
    return ", ".join(filter(None, parts)) or "the file does not say how"
