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
from depthkv_edge.quality.canvas import COLOURS, FILE, WIDE
from depthkv_edge.quality.page import render_page, write_page
from depthkv_edge.quality.plots import Plot, draw_plots, plots_of
from depthkv_edge.quality.typeset import count, duration, fixed, mib, nats, percent, plain, small
from depthkv_edge.quality.verdict import LIMIT, front, verdict

Report = dict[str, Any]

SAMPLE: Report = json.loads((Path(__file__).parents[1] / "data" / "eval-report.json").read_text())
METRICS = list(SAMPLE["rows"][2]["metrics"])
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


def set_kl(report: Report, label: str, mean: float) -> None:
    row_of(report, label)["metrics"]["kl"] |= {"mean": mean, "low": mean * 0.9, "high": mean * 1.1}


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
        (small(0.0998), "0.10"),
        (small(1234.5), "1200"),
        (small(3.14e-7), "3.1e−7"),
        (small(-0.021), "−0.021"),
        (small(float("nan")), "–"),
        (plain(1e-7), "1e−7"),
        (fixed(-0.001, 2), "0.00"),
        (nats(-9.996), "−10.0"),
        (percent(0.971, 1), "97.1\u00a0%"),
        (mib(2**20 * 19.14), "19.1\u00a0MiB"),
        (count(1234567), "1\u202f234\u202f567"),
        (duration(90), "1.5\u00a0min"),
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
    for label, mean in (("noise", 1e-6), ("depth 0.4", 0.03), ("uniform 0.4", 0.004), ("kv-q4_0", 0.002)):
        set_kl(report, label, mean)
    found = verdict(report)
    assert "interval included) is kv-q4_0: 25.3" in found.summary
    assert "With layers sized by calibration, no row stays that close." in found.summary
    assert found.remarks[0].startswith("kv-q4_0 beats depth 0.4: 25.3") and found.remarks[0].endswith("against 0.030.")
    assert found.remarks[1:] == [
        "Against uniform at the same budget, the KL divergence of depth is 7.5 times higher at 0.4."
    ]
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


@settings(max_examples=40, deadline=None)
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
    assert {path.parent for path in paths} == {tmp_path / "new" / "plots"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(
    ("name", "metric", "value"),
    [("kl", "kl", "mean"), ("passkey", "passkey", "log_prob"), ("decode", "decode", "ratio")],
)
def test_lines(name, metric, value):
    """Each method is one line through its budgets, at the shares and values of the report, with its interval."""
    report = sample()
    axes = plot_of(report, name).draw(WIDE).axes[0]
    lines = {container.get_label(): container.lines for container in axes.containers}
    assert list(lines) == ["depth", "uniform", "streaming", "kv-q8_0", "kv-q4_0", "depth+kv-q8_0"]
    for method, (line, _, (bars,)) in lines.items():
        rows = sorted((row for row in report["rows"] if row["method"] == method), key=lambda row: row["kv"]["share"])
        points = [(row["kv"]["share"], row["metrics"][metric][value]) for row in rows]
        bounds = [(row["metrics"][metric]["low"], row["metrics"][metric]["high"]) for row in rows]
        np.testing.assert_allclose(line.get_xydata(), points)
        np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], bounds)
    marks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line, _, _ in lines.values()}
    assert len(marks) == len(lines), "no two methods look alike"


def test_heat_maps():
    """Depth beside uniform, a budget below the other, on one scale; layers have the model's numbers."""
    report = sample()
    for row in report["rows"]:
        for layer in row["kv"]["layers"]:
            layer["layer"] += 100
    panels = [axes for axes in plot_of(report, "occupancy").draw(WIDE).axes if axes.images]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == [f"{method} {budget}" for budget in (0.2, 0.4, 0.6) for method in ("depth", "uniform")]
    for axes, title in zip(panels, titles, strict=True):
        (image,) = axes.images
        expected = [layer["occupancy"] for layer in row_of(SAMPLE, title)["kv"]["layers"]]
        np.testing.assert_array_equal(image.get_array(), np.array(expected))
        assert image.get_clim() == (0, 1) and image.cmap == panels[0].images[0].cmap
    assert panels[0].get_yticklabels()[0].get_text() == "100"


@settings(max_examples=6, deadline=None)
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
    small_report = sample(["depth 0.4"], ["kl"])
    assert render_page(small_report) == render_page(small_report)


def test_accessible(page):
    """Language, title, one h1, no level left out, named tables and figures, scope of every heading of a table."""
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    title = "".join(text for tag, text in page.texts if tag == "title")
    assert title == "SmolLM2 135M Instruct: KV caches compared"
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(attributes.get("scope") for attributes in page.all("th"))
    regions = [attributes for _, attributes in page.elements if attributes.get("role") == "region"]
    assert len(regions) == len(page.tables)
    assert all(region["aria-label"] and region["tabindex"] == "0" for region in regions)
    images = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("role") == "img"]
    assert len(images) == len(page.all("figure")) == 5
    assert images[0].startswith("KL divergence against KV bytes, for depth, uniform, ")
    assert "width=device-width" in str(page.all("meta"))


def test_rows(page):
    """Every row is a row of every table of rows, and a number is what the report says."""
    labels = [row["label"] for row in SAMPLE["rows"]]
    headline, tasks, by_text, texts = page.tables
    for table in (headline, tasks, by_text):
        assert [cells[0] for cells in table[2:]] == labels
    assert page.row(0, "depth 0.4") == [
        *("36.0", "40\u00a0%", "1\u202f631 of 4\u202f096 632 to 4\u202f096", "0.0062 0.0054 to 0.0072", "1.0028"),
        *("96.5\u00a0%", "−3.02 −3.73 to −2.38", "55\u00a0%", "−2.30 −2.93 to −1.74", "60\u00a0%"),
        *("1.15 1.12 to 1.18", "1.60 1.49 to 1.73", "49.9"),
    ]
    assert page.row(1, "uniform 0.2") == [
        *("−17.3 −19.7 to −15.1", "0\u00a0%", "−10.2 −11.8 to −8.78", "5\u00a0%"),
        *("−3.60 −4.38 to −2.90", "55\u00a0%", "−9.70 −11.2 to −8.34", "5\u00a0%"),
        *("22\u00a0%", "17.0", "0.41", "0.27"),
    ]
    assert by_text[1] == [text["name"] for text in SAMPLE["settings"]["texts"]]
    for row in SAMPLE["rows"]:
        assert page.row(2, row["label"]) == [small(value) for value in row["metrics"]["kl"]["by_text"].values()]
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
        "llama.cpp 0c1e57098, library sha256 9f1c2f0be4d0c7ab",
        "AMD EPYC, 2 cores, 2 threads used, 8.0\u00a0GiB of memory, Linux 6.1 x86_64",
    ):
        assert " ".join(part.split()) in page.text, part
    report = sample([], [])
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


def test_a_missing_number_is_a_dash():
    report = sample(["depth 0.4", "uniform 0.4"], ["kl", "multikey"])
    del row_of(report, "uniform 0.4")["metrics"]["multikey"]
    assert Page(render_page(report)).row(0, "uniform 0.4")[-2:] == ["–", "–"]


# writing it


def test_in_one_step(tmp_path, monkeypatch):
    """The page replaces what was there, through a link too, or leaves it as it was; there is nothing else."""
    (tmp_path / "real.html").write_text("old")
    (tmp_path / "r.html").symlink_to("real.html")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(DepthKVError, match=r"cannot write .*l\.html: No space left on device; choose another path"):
            write_page(sample([], []), tmp_path / "r.html")
    assert (tmp_path / "real.html").read_text() == "old"
    write_page(sample([], []), tmp_path / "r.html")
    assert (tmp_path / "real.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "real.html"]
    assert (tmp_path / "r.html").is_symlink()


def test_bad_targets(tmp_path):
    for path, why in (tmp_path / "none" / "r.html", "No such file or directory"), (tmp_path, "Is a directory"):
        with pytest.raises(DepthKVError, match=f"{why}; choose another path"):
            write_page(sample([], []), path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DepthKVError, match=r"cannot write .*kl\.png: .*; choose another directory"):
        draw_plots(sample(["depth 0.4"], ["kl"]), tmp_path / "file")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_package(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DepthKVError, match=rf"{package} is not installed; run `pip install 'depthkv-edge\[eval\]'`"):
        write_page(sample(["depth 0.4"], ["kl"]), tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


# how it looks


def test_contrast():
    """WCAG 2, level AA."""

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for name in COLOURS.keys() - {"paper", "grid", "band"}:
        for colour, paper in zip(COLOURS[name], COLOURS["paper"], strict=True):
            low, high = sorted(luminance(each) + 0.05 for each in (colour, paper))
            assert high / low >= 4.5, (name, paper)


def test_colours_follow_the_page(text):
    """No colour of a plot is fixed: on a dark page it would be dark on dark."""
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r"base64,[^\"]*", "", svg))
    used = set(re.findall(r"var\(--(\w+)\)", svg))
    assert {"ink", "muted", "grid", "band", "paper", "blue", "orange", "green"} <= used <= set(COLOURS)
    assert "@media (prefers-color-scheme: dark)" in text
    assert all(f"--{name}: {colour};" in text for name in used for colour in COLOURS[name])


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1400,1000 --dump-dom"
).split()
MEASURE = """
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    const shown = (element) => element.getClientRects().length > 0;
    const font = (element) => parseFloat(frame.contentWindow.getComputedStyle(element).fontSize);
    const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
    const written = [...page.querySelectorAll("body *")].filter(
      (e) => shown(e) && !e.closest("svg") && [...e.childNodes].some((n) => n.nodeType == 3 && n.data.trim()));
    return {
      width: root.scrollWidth, visible: root.clientWidth, fonts: written.map(font),
      svgs: [...page.querySelectorAll("svg")].filter(shown).map((svg) => {
        const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
        const texts = [...svg.querySelectorAll("text")];
        return { box: box(svg), texts: texts.map((e) => ({ box: box(e), font: font(e) * scale })) };
      }),
      scrolling: [...page.querySelectorAll(".scroll")].map((e) => e.scrollWidth - e.clientWidth),
    };
  });
  document.body.textContent = JSON.stringify(found);
});
"""


def measure(text: str, directory: Path, widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """What a browser makes of a page in frames of these widths."""
    frames = "".join(
        f'<iframe srcdoc="{html.escape(text)}" style="width:{width}px;height:900px;border:0"></iframe>'
        for width in widths
    )
    wrapper = directory / "wrapper.html"
    wrapper.write_text(f'<!doctype html><meta charset="utf-8"><script>{MEASURE}</script><body>{frames}', "utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={directory / 'profile'}", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert body, done.stderr
    return json.loads(html.unescape(body[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH to render with")
def test_in_a_browser(text, tmp_path):
    """On a phone, a tablet and a desktop: no sideways scrolling, readable text, no label on another."""

    def meet(a: list[float], b: list[float]) -> bool:
        return a[0] < b[2] - 1 and b[0] < a[2] - 1 and a[1] < b[3] - 3 and b[1] < a[3] - 3

    widths = (360, 390, 800, 1200)
    for width, found in zip(widths, measure(text, tmp_path, widths), strict=True):
        assert found["width"] == found["visible"] == width
        assert len(found["fonts"]) > 500 and min(found["fonts"]) >= 15
        assert len(found["svgs"]) == 5, "one of the two of each plot"
        assert max(found["scrolling"][:2]) > 0 or width > 1000, "a wide table scrolls, alone"
        for svg in found["svgs"]:
            left, _, right, _ = svg["box"]
            assert 0 <= left and right <= width
            boxes = [each["box"] for each in svg["texts"]]
            assert len(boxes) > 15 and not any(meet(a, b) for a, b in itertools.combinations(boxes, 2))
            assert min(each["font"] for each in svg["texts"]) >= 14.9
            assert all(left - 4 <= box[0] and box[2] <= width for box in boxes)
