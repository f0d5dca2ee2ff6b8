"""The report of an evaluation: plots, the words above them, and one page that a phone can show.

`data/eval-report.json` is made up: all metrics, 30 layers, figures of the order that SmolLM2 has.
"""

from __future__ import annotations

import copy
import html
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthkv_edge import DepthKVError
from depthkv_edge.quality.canvas import COLOURS, FILE, NARROW, WIDE
from depthkv_edge.quality.page import render_page, write_page
from depthkv_edge.quality.plots import Plot, draw_plots, plots_of
from depthkv_edge.quality.typeset import count, duration, fixed, mib, nats, percent, plain, small
from depthkv_edge.quality.verdict import LIMIT, front, verdict

Report = dict[str, Any]

SAMPLE: Report = json.loads((Path(__file__).parents[1] / "data" / "eval-report.json").read_text())
METRICS = list(SAMPLE["rows"][2]["metrics"])
LANGUAGE = ["kl", "perplexity", "top1", "prefill", "decode"]
RETRIEVAL = ["passkey", "multikey"]


def sample(labels: list[str] | None = None, metrics: list[str] | None = None, *, layers: int = 30) -> Report:
    """The sample, or the part of it with these rows (full and noise always), metrics and number of layers."""
    rows = [row for row in SAMPLE["rows"] if labels is None or row["label"] in ("full", "noise", *labels)]
    rows = [row | {"kv": row["kv"] | {"layers": row["kv"]["layers"][:layers]}} for row in rows]
    report = copy.deepcopy(SAMPLE | {"rows": rows})
    if metrics is not None:
        for row in report["rows"]:
            row["metrics"] = {name: row["metrics"][name] for name in metrics}
    return report


def row_of(report: Report, label: str) -> dict[str, Any]:
    return next(row for row in report["rows"] if row["label"] == label)


def set_kl(report: Report, label: str, mean: float, low: float | None = None, high: float | None = None) -> None:
    row_of(report, label)["metrics"]["kl"] |= {
        "mean": mean,
        "low": mean * 0.9 if low is None else low,
        "high": mean * 1.1 if high is None else high,
    }


def plot_of(report: Report, name: str) -> Plot:
    return next(plot for plot in plots_of(report) if plot.name == name)


class Page(HTMLParser):
    """What a browser would find: elements with attributes, text by element, and the cells of every table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))
        if "td" in self.open or "th" in self.open:
            cells = self.tables[-1][-1]
            cells[-1] += (" " if self.open[-1] == "span" and cells[-1] else "") + data

    @property
    def text(self) -> str:
        return " ".join(" ".join(text for tag, text in self.texts if tag != "style").split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, table: int, label: str) -> list[str]:
        return next(cells[1:] for cells in self.tables[table] if cells and cells[0] == label)


@pytest.fixture(scope="module")
def text() -> str:
    return render_page(sample())


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


# numbers


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (small(0.0), "0"),
        (small(0.00437), "0.0044"),
        (small(0.0998), "0.10"),
        (small(12.34), "12"),
        (small(1234.5), "1200"),
        (small(9.96e-6), "0.000010"),
        (small(3.14e-7), "3.1e−7"),
        (small(-0.021), "−0.021"),
        (small(None), "–"),
        (small(float("nan")), "–"),
        (plain(0.001), "0.001"),
        (plain(1e-7), "1e−7"),
        (plain(-2.5), "−2.5"),
        (plain(0), "0"),
        (plain(100), "100"),
        (fixed(-0.001, 2), "0.00"),
        (fixed(-1.005, 1), "−1.0"),
        (nats(-2.345), "−2.35"),
        (nats(-9.996), "−10.0"),
        (nats(None), "–"),
        (percent(0.971), "97\u00a0%"),
        (percent(0.971, 1), "97.1\u00a0%"),
        (percent(None), "–"),
        (mib(2**20 * 19.14), "19.1\u00a0MiB"),
        (count(1234567), "1\u202f234\u202f567"),
        (count(None), "–"),
        (duration(42), "42\u00a0s"),
        (duration(89), "89\u00a0s"),
        (duration(90), "1.5\u00a0min"),
        (duration(3 * 3600), "3.0\u00a0h"),
    ],
)
def test_numbers(shown, expected):
    assert shown == expected


@given(st.floats(-1e6, 1e6))
def test_small_is_close(value):
    back = float(small(value).replace("−", "-"))
    assert back == pytest.approx(value, rel=0.051, abs=1e-300)


# the words


def test_verdict():
    found = verdict(sample())
    assert found.summary.replace("\u00a0", " ") == (
        "The smallest KV cache that stays close to the full one (KL divergence up to 0.01 nats per token, interval "
        "included) is depth+kv-q8_0 0.4: 19.1 MiB (21 %), KL divergence 0.0066 (95 % interval 0.0058 to 0.0078). Its "
        "multi-key log-probability is −3.07 nats, that of the full cache −2.31, and it decodes at 1.21× the full "
        "cache's speed. Without layers sized by calibration, the smallest is kv-q8_0: 47.8 MiB (53 %)."
    )
    assert [remark.replace("\u00a0", " ") for remark in found.remarks] == [
        "kv-q8_0 beats depth 0.6: 47.8 MiB (53 %) against 54.0 MiB (60 %), KL divergence 0.0042 against 0.0044, though "
        "their intervals overlap.",
        "Against uniform at the same budget, the KL divergence of depth is 3.4 times lower at 0.2, 3.2 times lower at "
        "0.4 and 1.7 times lower at 0.6.",
        "The loss of depth 0.6, kv-q8_0 and depth+kv-q8_0 0.6 may be no more than an irrelevant change costs: the "
        "noise floor is 0.0038.",
    ]


def test_verdict_against_us():
    """Another method is the best, and uniform is ahead of calibrated layers: the page says so."""
    report = sample(["depth 0.4", "uniform 0.4", "kv-q4_0"])
    for label, mean in (("noise", 1e-6), ("depth 0.4", 0.008), ("uniform 0.4", 0.004), ("kv-q4_0", 0.002)):
        set_kl(report, label, mean)
    found = verdict(report)
    assert "(KL divergence up to 0.01 nats per token, interval included) is kv-q4_0: 25.3" in found.summary
    assert "With layers sized by calibration, the smallest is depth 0.4: 36.0" in found.summary
    assert found.remarks[0].startswith("kv-q4_0 beats depth 0.4: 25.3") and found.remarks[0].endswith("against 0.0080.")
    assert found.remarks[1:] == [
        "Against uniform at the same budget, the KL divergence of depth is 2.0 times higher at 0.4."
    ]
    set_kl(report, "depth 0.4", 0.03)
    assert "With layers sized by calibration, no row stays that close." in verdict(report).summary


def test_verdict_of_little():
    """Nothing close, overlapping intervals, a noise floor above the limit, and no KL divergence at all."""
    report = sample(["depth 0.2", "uniform 0.2"], ["kl"])
    found = verdict(report)
    assert found.summary.startswith("No row stays close to the full cache")
    assert "depth 0.2 comes nearest: 18.0" in found.summary and "decodes" not in found.summary
    set_kl(report, "depth 0.2", 0.05, high=0.07)
    set_kl(report, "uniform 0.2", 0.06, low=0.04)
    assert "1.2 times lower at 0.2 (the intervals overlap)" in verdict(report).remarks[0]
    set_kl(report, "noise", 0.08, high=0.09)
    assert "up to 0.09 nats per token" in verdict(report).summary
    found = verdict(sample(metrics=["passkey"]))
    assert "was not measured" in found.summary and found.remarks == []


@st.composite
def reports(draw: st.DrawFn) -> Report:
    """Any rows, any metrics, any numbers that a row may have."""
    labels = draw(st.lists(st.sampled_from([row["label"] for row in SAMPLE["rows"][2:]]), unique=True))
    report = sample(labels, draw(st.lists(st.sampled_from(METRICS), unique=True)), layers=2)
    for row in report["rows"]:
        if draw(st.booleans()):
            row["kv"] = {name: row["kv"][name] for name in ("bytes", "bytes_full", "share")}
        for name in draw(st.lists(st.sampled_from(METRICS), unique=True)):
            row["metrics"].pop(name, None)
        metrics = row["metrics"]
        if "kl" in metrics and row["label"] != "full":
            mean = draw(st.sampled_from([0.0, 1e-12, 3e-7, 0.01, 20.0]) | st.floats(0, 30))
            low, high = mean * draw(st.floats(0, 1)), mean * draw(st.floats(1, 3))
            metrics["kl"] |= {"mean": mean, "low": low, "high": high}
        for name in {"passkey", "multikey"} & metrics.keys():
            metrics[name] |= {"log_prob": -draw(st.floats(0, 500)), "exact": draw(st.floats(0, 1))}
    return report


@given(reports())
def test_verdict_is_true(report):
    """Found again in another way, for any numbers."""
    found = verdict(report)
    rows = {
        row["label"]: (row["kv"]["bytes"], row["metrics"]["kl"]) for row in report["rows"] if "kl" in row["metrics"]
    }
    rows.pop("full", None)
    noise = rows.pop("noise", (0, {"high": 0}))[1]
    close = {label: n for label, (n, kl) in rows.items() if kl["high"] <= max(LIMIT, noise["high"])}
    if close:
        named = re.search(r"included\) is (.+?): ", found.summary)[1]
        assert close[named] == min(close.values())
    elif rows:
        named = re.search(r"; (.+?) comes nearest: ", found.summary)[1]
        assert rows[named][1]["mean"] == min(kl["mean"] for _, kl in rows.values())
    for remark in found.remarks:
        if beaten := re.match(r"(\S+(?: [\d.]+)?) beats (.+?): ", remark):
            (n, kl), (n_other, kl_other) = (rows[label] for label in beaten.groups())
            assert n <= n_other and kl["mean"] <= kl_other["mean"]
    best = {row["label"] for row in front(report["rows"][2:])}
    for label, (n, kl) in rows.items():
        beaten = any(
            m <= n and other["mean"] <= kl["mean"] and (m, other["mean"]) != (n, kl["mean"])
            for m, other in rows.values()
        )
        assert (label in best) != beaten


# plots


def test_files(tmp_path):
    paths = draw_plots(sample(), tmp_path / "new" / "plots")
    assert [path.name for path in paths] == ["kl.png", "decode.png", "passkey.png", "multikey.png", "occupancy.png"]
    assert sorted(path.name for path in (tmp_path / "new" / "plots").iterdir()) == sorted(path.name for path in paths)
    for path in paths:
        content = path.read_bytes()
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        assert content.startswith(b"\x89PNG") and width == 1200 and height >= 750
    again = draw_plots(sample(), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


@pytest.mark.parametrize(
    ("name", "metric", "value"),
    [("kl", "kl", "mean"), ("passkey", "passkey", "log_prob"), ("decode", "decode", "ratio")],
)
def test_lines(name, metric, value):
    """Each method is one line through its budgets, at the shares and values of the report, with its interval."""
    report = sample()
    axes = plot_of(report, name).draw(WIDE).axes[0]
    assert axes.get_yscale() == ("log" if name == "kl" else "linear")
    lines = {container.get_label(): container.lines for container in axes.containers}
    assert list(lines) == ["depth", "uniform", "streaming", "kv-q8_0", "kv-q4_0", "depth+kv-q8_0"]
    for method, (line, _, (bars,)) in lines.items():
        rows = [row for row in report["rows"] if row["method"] == method]
        expected = [(row["kv"]["share"], row["metrics"][metric][value]) for row in rows]
        np.testing.assert_allclose(line.get_xydata(), sorted(expected))
        assert line.get_linestyle() == ("None" if len(rows) == 1 else "--" if "+" in method else "-")
        bounds = sorted(
            (row["kv"]["share"], row["metrics"][metric]["low"], row["metrics"][metric]["high"]) for row in rows
        )
        np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [b[1:] for b in bounds])
    marks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line, _, _ in lines.values()}
    assert len(marks) == len(lines), "no two methods look alike"
    low, high = axes.get_ylim()
    drawn = np.concatenate([line.get_ydata() for line, _, _ in lines.values()])
    assert low < drawn.min() and drawn.max() < high


def test_references():
    """The noise floor is a band behind KL divergence, the full cache a line behind the others."""
    report = sample()
    noise, full = row_of(report, "noise")["metrics"], row_of(report, "full")["metrics"]
    axes = plot_of(report, "kl").draw(WIDE).axes[0]
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((noise["kl"]["low"], noise["kl"]["high"]))
    assert "noise floor" in {text.get_text() for text in axes.texts}
    axes = plot_of(report, "passkey").draw(WIDE).axes[0]
    assert [full["passkey"]["log_prob"]] * 2 in [list(line.get_ydata()) for line in axes.lines]
    assert not axes.patches and "full cache" in {text.get_text() for text in axes.texts}


def test_noise_far_below():
    """F32 weights: the floor would take up most of the panel, so the caption has it."""
    report = sample()
    set_kl(report, "noise", 3e-9)
    plot = plot_of(report, "kl")
    assert "3.0e−9, lies below the panel" in plot.caption
    assert plot.draw(WIDE).axes[0].get_ylim()[0] > 1e-4


def test_zero_on_a_log_axis():
    report = sample(["depth 0.4", "depth 0.6"], ["kl"])
    set_kl(report, "depth 0.6", 0.0)
    plot = plot_of(report, "kl")
    axes = plot.draw(WIDE).axes[0]
    line = axes.containers[0].lines[0]
    assert line.get_ydata()[1] == pytest.approx(axes.get_ylim()[0]) and "lower edge" in plot.caption
    for label in ("depth 0.4", "noise"):
        set_kl(report, label, 0.0)
    plot_of(report, "kl").draw(WIDE)


@pytest.mark.parametrize("shape", [NARROW, WIDE, FILE])
def test_every_method_is_named_once(shape):
    """Beside its line or in the legend, and no name covers another."""
    for plot in plots_of(sample())[:-1]:
        figure = plot.draw(shape)
        figure.canvas.draw()
        legends = [text for legend in figure.legends for text in legend.get_texts()]
        texts = [text for text in (*figure.axes[0].texts, *figure.texts, *legends) if text.get_text()]
        names = [text.get_text() for text in texts]
        assert all(names.count(row["method"]) == 1 for row in SAMPLE["rows"][2:])
        boxes = [text.get_window_extent().padded(-1) for text in texts]
        assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
        assert all(-2 < box.x0 and box.x1 < shape.width + 2 for box in boxes)


def test_many_methods_get_a_legend():
    report = sample()
    for i, method in enumerate(("window", "truncate", "context-shift", "shuffled", "random")):
        for row in [row for row in report["rows"] if row["method"] == "uniform"]:
            label = f"{method} {row['budget']}"
            report["rows"].append(copy.deepcopy(row) | {"method": method, "label": label})
            set_kl(report, label, row["metrics"]["kl"]["mean"] * (1.1 + 0.1 * i))
    for shape in (NARROW, WIDE):
        figure = plot_of(report, "kl").draw(shape)
        figure.canvas.draw()
        (legend,) = figure.legends
        assert len(legend.get_texts()) == 11
        box = legend.get_window_extent()
        assert box.x1 <= figure.bbox.width + 1 and box.y0 >= -1
        assert box.y1 < figure.axes[0].xaxis.label.get_window_extent().y0


def test_heat_maps():
    """Depth beside uniform, a budget below the other, all of one size and on one scale."""
    figure = plot_of(sample(), "occupancy").draw(WIDE)
    panels = [axes for axes in figure.axes if axes.images]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == [f"{method} {budget}" for budget in (0.2, 0.4, 0.6) for method in ("depth", "uniform")]
    for axes, title in zip(panels, titles, strict=True):
        (image,) = axes.images
        expected = [layer["occupancy"] for layer in row_of(SAMPLE, title)["kv"]["layers"]]
        np.testing.assert_array_equal(image.get_array(), np.array(expected))
        assert image.get_clim() == (0, 1) and image.cmap == panels[0].images[0].cmap
    sizes = {tuple(np.round(axes.get_window_extent().size, 3)) for axes in panels}
    assert len(sizes) == 1


def test_heat_maps_of_other_methods():
    panels = plot_of(sample(["streaming 0.2", "kv-q8_0"]), "occupancy").draw(NARROW).axes
    assert [axes.get_title(loc="left") for axes in panels if axes.images] == ["streaming 0.2"]
    assert "occupancy" not in [plot.name for plot in plots_of(sample(["kv-q8_0", "kv-q4_0"]))]


def test_sliding_window_layers():
    """Layers are named as the model numbers them, and there may be few."""
    report = sample(["depth 0.4"])
    layers = row_of(report, "depth 0.4")["kv"]["layers"]
    row_of(report, "depth 0.4")["kv"]["layers"] = [layers[5], layers[11], layers[17]]
    axes = plot_of(report, "occupancy").draw(NARROW).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["5", "11", "17"]


@settings(max_examples=12, deadline=None)
@given(reports())
def test_any_report_is_drawn(report):
    """And what is drawn is what the report has numbers for."""
    methods = report["rows"][2:]
    expected = [name for name in ("kl", "decode", *RETRIEVAL) if any(name in row["metrics"] for row in methods)]
    held = any(row["budget"] and "layers" in row["kv"] for row in methods)
    plots = plots_of(report)
    assert [plot.name for plot in plots] == expected + ["occupancy"] * held
    found = Page(render_page(report))
    assert len(found.all("svg")) == 2 * len(plots)
    assert [cells[0] for cells in found.tables[0][2:]] == [row["label"] for row in report["rows"]]


# the page


def test_self_contained(page, text):
    """Nothing is fetched, nothing runs, and no id is there twice."""
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "base"), tag
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), attributes
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100
    references = re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', text)
    assert references and set(references) <= set(ids)
    assert len(text) < 600_000
    assert text == render_page(sample()), "the same report gives the same page"


def test_accessible(page):
    """Language, title, one h1, no level left out, named tables and figures, scope of every heading of a table."""
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    title = "".join(text for tag, text in page.texts if tag == "title")
    assert title == "SmolLM2 135M Instruct: KV caches compared"
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(attributes.get("scope") for attributes in page.all("th"))
    regions = [attributes for _, attributes in page.elements if attributes.get("role") == "region"]
    assert len(regions) == len(page.tables) and all(
        region["aria-label"] and region["tabindex"] == "0" for region in regions
    )
    images = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("role") == "img"]
    assert len(images) == len(page.all("figure")) == 5
    assert images[0] == (
        "KL divergence against KV bytes, for depth, uniform, streaming, kv-q8_0, kv-q4_0, depth+kv-q8_0. The numbers "
        "are in the tables."
    )
    assert "width=device-width" in str(page.all("meta"))


def test_rows(page):
    """Every row is a row of every table of rows, and a number is what the report says."""
    labels = [row["label"] for row in SAMPLE["rows"]]
    headline, tasks, by_text, texts = page.tables
    for table in (headline, tasks, by_text):
        assert [cells[0] for cells in table[2:]] == labels
    assert page.row(0, "depth 0.4") == [
        "36.0",
        "40\u00a0%",
        "1\u202f631 of 4\u202f096 632 to 4\u202f096",
        "0.0062 0.0054 to 0.0072",
        "1.0028",
        "96.5\u00a0%",
        "−3.02 −3.73 to −2.38",
        "55\u00a0%",
        "−2.30 −2.93 to −1.74",
        "60\u00a0%",
        "1.15 1.12 to 1.18",
        "1.60 1.49 to 1.73",
        "49.9",
    ]
    assert headline[1] == [
        *("MiB", "of full", "held by a layer, of seen", "nats per token", "ratio to full", "agreement"),
        *2 * ("log-prob., nats", "exact"),
        *("ratio to full", "ratio to full", "tokens/s"),
    ]
    assert page.row(1, "uniform 0.2") == [
        *("−17.3 −19.7 to −15.1", "0\u00a0%", "−10.2 −11.8 to −8.78", "5\u00a0%"),
        *("−3.60 −4.38 to −2.90", "55\u00a0%", "−9.70 −11.2 to −8.34", "5\u00a0%"),
        *("22\u00a0%", "17.0", "0.41", "0.27"),
    ]
    assert by_text[1] == [text["name"] for text in SAMPLE["settings"]["texts"]]
    for row in SAMPLE["rows"]:
        assert page.row(2, row["label"]) == [small(value) for value in row["metrics"]["kl"]["by_text"].values()]
        cells = page.row(0, row["label"])
        for metric, column in (("multikey", 6), ("passkey", 8)):
            assert cells[column].startswith(nats(row["metrics"][metric]["log_prob"]))
            assert cells[column + 1] == percent(row["metrics"][metric]["exact"])
    assert [cells[0] for cells in texts[1:]] == by_text[1] and "3b1f5a90c2de4781" in texts[1][2]


def test_bold_rows(text):
    """Those that nothing beats, and no others."""
    found = re.findall(r'<tr class="strong"><th[^>]*><span>(.*?)</span>(.*?)</th>', text)
    expected = ["depth 0.2", "kv-q8_0", "depth+kv-q8_0 0.2", "depth+kv-q8_0 0.4", "depth+kv-q8_0 0.6"]
    assert ["".join(parts) for parts in found] == expected


def test_how_it_was_measured(page):
    for part in (
        SAMPLE["command"],
        "smollm2-depthkv.gguf, 93.8\u00a0MiB, llama, weights Q4_1",
        "these weights: the product as it is",
        "method exact, Python documentation and standard library, rank correlation between texts 0.93",
        "4\u202f096 tokens, 1 window of each text",
        "depthkv-edge 0.1.0, llama-cpp-python 0.3.36",
        "llama.cpp 0c1e57098, library sha256 9f1c2f0be4d0c7ab",
        "AMD EPYC, 2 cores, 2 threads used, 8.0\u00a0GiB of memory, Linux 6.1 x86_64",
        "87.2\u00a0min",
        "layers sized by calibrated sensitivity, the model's scorer; K and V in q8_0",
        "differences of this size mean nothing",
        "(n\u00a0=\u00a08\u202f192)",
    ):
        assert " ".join(part.split()) in page.text, part
    report = sample()
    report["model"] |= {"reference": "f32", "calibration": None, "weights": None}
    report["machine"]["processor"] = None
    other = Page(render_page(report)).text
    assert "dequantised to F32" in other and "none: layers are equal in size" in other and "None" not in other


def test_hostile_names():
    """Text of a file is text, in the page and in the plots, whatever it holds."""
    bad = "<script>alert('x')</script>\"&amp;$\\frac{$ {{ 7*7 }}"
    report = sample(["depth 0.4"])
    report["model"] |= {"name": bad, "file": bad, "architecture": bad}
    report["model"]["calibration"] |= {"corpus": bad, "method": bad}
    report["machine"]["processor"] = report["command"] = report["settings"]["texts"][0]["name"] = bad
    for row in report["rows"]:
        row["metrics"]["kl"]["by_text"][bad] = 0.5
    found = Page(render_page(report))
    assert not found.all("script")
    plain_text = " ".join(bad.split())
    assert found.text.count(plain_text) >= 8
    assert found.tables[2][1][-1] == bad and found.tables[3][1][0] == bad
    plot_of(report, "kl").draw(FILE)


@pytest.mark.parametrize(
    ("labels", "metrics"),
    [([], []), (["kv-q8_0"], LANGUAGE), (["depth 0.4"], []), (["depth 0.4"], ["kl"]), (["uniform 0.2"], RETRIEVAL)],
)
def test_small_reports(labels, metrics, tmp_path):
    report = sample(labels, metrics)
    write_page(report, tmp_path / "r.html")
    found = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    plots = draw_plots(report, tmp_path)
    assert len(found.all("figure")) == len(plots)
    columns = {"kl": 1, "perplexity": 1, "top1": 1, "prefill": 1, "decode": 2, "passkey": 2, "multikey": 2}
    assert len(found.tables[0][1]) == 3 + sum(columns[name] for name in metrics)
    assert len(found.tables) == (3 if "kl" in metrics else 2)


def test_a_missing_number_is_a_dash():
    report = sample(["depth 0.4", "uniform 0.4"], ["kl", "multikey"])
    del row_of(report, "uniform 0.4")["metrics"]["multikey"]
    assert Page(render_page(report)).row(0, "uniform 0.4")[-2:] == ["–", "–"]


# writing it


def test_in_one_step(tmp_path):
    """The page replaces what was there, through a link too, and leaves nothing else."""
    (tmp_path / "real.html").write_text("old")
    (tmp_path / "r.html").symlink_to("real.html")
    write_page(sample(["depth 0.4"]), tmp_path / "r.html")
    assert (tmp_path / "real.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "real.html"]
    assert (tmp_path / "r.html").is_symlink()


def test_failure_leaves_the_old_page(tmp_path, monkeypatch):
    (tmp_path / "r.html").write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DepthKVError, match=r"cannot write .*r\.html: No space left on device; choose another path"):
        write_page(sample([], []), tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"] and (tmp_path / "r.html").read_text() == "old"


def test_bad_targets(tmp_path):
    with pytest.raises(DepthKVError, match="No such file or directory; choose another path"):
        write_page(sample([], []), tmp_path / "none" / "r.html")
    with pytest.raises(DepthKVError, match="Is a directory; choose another path"):
        write_page(sample([], []), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DepthKVError, match=r"cannot write .*kl\.png: .*; choose another directory"):
        draw_plots(sample(["depth 0.4"]), tmp_path / "file")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_package(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DepthKVError, match=rf"{package} is not installed; run `pip install 'depthkv-edge\[eval\]'`"):
        write_page(sample(["depth 0.4"]), tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


# how it looks


def luminance(colour: str) -> float:
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("name", [name for name in COLOURS if name not in ("paper", "grid", "band")])
def test_contrast(name, theme):
    """WCAG 2, level AA."""
    one, other = (luminance(COLOURS[each][theme]) + 0.05 for each in (name, "paper"))
    assert max(one, other) / min(one, other) >= 4.5


def test_colours_follow_the_page(text):
    """No colour of a plot is fixed: on a dark page it would be dark on dark."""
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r"base64,[^\"]*", "", svg))
    used = set(re.findall(r"var\(--(\w+)\)", svg))
    assert {"ink", "muted", "grid", "band", "paper", "blue", "orange", "green"} <= used <= set(COLOURS)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
MEASURE = """
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    const shown = (element) => element.getClientRects().length > 0;
    const svgs = [...page.querySelectorAll("svg")].filter(shown);
    const sizes = [...page.querySelectorAll("body *")].filter(
      (e) => shown(e) && !e.closest("svg") && [...e.childNodes].some((n) => n.nodeType == 3 && n.data.trim()));
    const style = (element) => frame.contentWindow.getComputedStyle(element);
    const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
    return {
      width: root.scrollWidth, visible: root.clientWidth,
      fonts: sizes.map((e) => parseFloat(style(e).fontSize)),
      svgs: svgs.map((svg) => ({
        box: box(svg),
        scale: svg.getBoundingClientRect().width / svg.viewBox.baseVal.width,
        texts: [...svg.querySelectorAll("text")].map((e) => (
          { text: e.textContent, box: box(e), font: parseFloat(style(e).fontSize), colour: style(e).fill })),
      })),
      scrolling: [...page.querySelectorAll(".scroll")].map((e) => e.scrollWidth - e.clientWidth),
      background: style(page.body).backgroundColor, ink: style(page.body).color,
    };
  });
  document.body.textContent = JSON.stringify(found);
});
"""


def measure(text: str, directory: Path, *, widths: tuple[int, ...], dark: bool = False) -> list[dict[str, Any]]:
    """What a browser makes of a page in frames of these widths."""
    frames = "".join(
        f'<iframe srcdoc="{html.escape(text)}" style="width:{width}px;height:900px;border:0"></iframe>'
        for width in widths
    )
    wrapper = directory / "wrapper.html"
    wrapper.write_text(f'<!doctype html><meta charset="utf-8"><script>{MEASURE}</script><body>{frames}', "utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={directory / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert body, done.stderr
    return json.loads(html.unescape(body[1]))


def overlapping(texts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    def meet(a: list[float], b: list[float]) -> bool:
        return a[0] < b[2] - 1 and b[0] < a[2] - 1 and a[1] < b[3] - 3 and b[1] < a[3] - 3

    pairs = itertools.combinations(texts, 2)
    return [(a["text"], b["text"]) for a, b in pairs if meet(a["box"], b["box"])]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH to render with")
def test_in_a_browser(text, tmp_path):
    """On a phone, a tablet and a desktop: no sideways scrolling, readable text, no label on another."""
    widths = (360, 390, 800, 1200)
    for width, found in zip(widths, measure(text, tmp_path, widths=widths), strict=True):
        assert found["width"] == found["visible"] == width
        assert len(found["fonts"]) > 500 and min(found["fonts"]) >= 15
        assert len(found["svgs"]) == 5, "one of the two of each plot"
        assert max(found["scrolling"][:2]) > 0 or width > 1000, "a wide table scrolls, alone"
        for svg in found["svgs"]:
            assert 0 <= svg["box"][0] and svg["box"][2] <= width
            assert len(svg["texts"]) > 15 and not overlapping(svg["texts"])
            assert min(each["font"] for each in svg["texts"]) * svg["scale"] >= 14.9
            assert all(svg["box"][0] - 4 <= each["box"][0] and each["box"][2] <= width for each in svg["texts"])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH to render with")
@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(text, tmp_path, dark):
    """The page follows the reader's setting, and so do the plots in it."""
    (found,) = measure(text, tmp_path, widths=(390,), dark=dark)

    def css(name: str) -> str:
        return "rgb({}, {}, {})".format(*(int(COLOURS[name][dark][i : i + 2], 16) for i in (1, 3, 5)))

    assert (found["background"], found["ink"]) == (css("paper"), css("ink"))
    colours = {each["colour"] for svg in found["svgs"] for each in svg["texts"]}
    assert {css("ink"), css("muted")} <= colours <= {css(name) for name in COLOURS}
