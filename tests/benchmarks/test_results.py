"""The pages of results say what the reports say."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from benchmarks.results import PAGE, REPORTS, ROOT, SECTIONS, render


def report(name: str) -> dict[str, Any]:
    return json.loads((ROOT / REPORTS / f"{name}.json").read_text())


def readme_rows(after: str) -> list[list[str]]:
    """Cells of the first table of README after a text."""
    text = (ROOT / "README.md").read_text().split(after, 1)[1]
    lines = text[text.index("\n|") :].strip().split("\n\n", 1)[0].splitlines()
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_is_what_the_reports_say():
    assert (ROOT / PAGE).read_text() == render()


def test_every_picture_and_report_is_there():
    text = (ROOT / PAGE).read_text()
    pictures = re.findall(r"!\[\w+\]\(([^)]+)\)", text)
    assert pictures and all((ROOT / PAGE).parent.joinpath(picture).is_file() for picture in pictures)
    for section in SECTIONS:
        assert (ROOT / section.report).exists() == (f"## {section.title}" in text)


def test_no_place_of_a_machine():
    for path in (ROOT / REPORTS).glob("*.json"):
        assert not re.search(r'"/|[^\w.]/(?:home|root|work|tmp|Users)/', path.read_text()), path.name


def test_quality_in_readme():
    rows = {row["label"]: row for row in report("smollm2")["rows"]}
    shown = {
        "full, F16": "full",
        "full, another batch size and attention kernel": "noise",
        "sinks and recent tokens, 40 %": "streaming 0.4",
        "stock, q8_0": "kv-q8_0",
        "stock, q4_0": "kv-q4_0",
        **{f"calibrated, {n}0 %": f"depth 0.{n}" for n in (2, 4, 6)},
        **{f"equal layers, {n}0 %": f"uniform 0.{n}" for n in (4, 6)},
    }
    table = readme_rows("## Calibrate")
    assert {cells[0] for cells in table} == set(shown)
    for title, mib, kl, keys, decode in table:
        row = rows[shown[title]]
        metrics = row["metrics"]
        assert float(mib) == round(row["kv"]["bytes"] / 2**20, 1)
        assert not kl or kl == f"{metrics['kl']['mean']:.4f}".removeprefix("0")
        assert float(keys) == pytest.approx(metrics["multikey"]["log_prob"], abs=0.0501)
        assert not decode or float(decode.rstrip("x")) == pytest.approx(metrics["decode"]["ratio"], abs=0.00501)


def test_speed_in_readme():
    rows = {row["label"]: row for row in report("speed")["rows"]}
    for title, mib, peak, first, *decode in readme_rows("## What it costs"):
        row = rows[title]
        assert float(mib) == round(row["kv_bytes"] / 2**20)
        assert float(peak.split()[0]) == round(row["peak_rss_bytes"] / 2**20)
        assert float(first.split()[0]) == round(row["first_token_seconds"], 1)
        if title != "stock":
            ratios = [row["decode"][depth]["ratio"] for depth in ("full", "half", "empty")]
            assert [float(cell.rstrip("x")) for cell in decode] == [pytest.approx(r, abs=0.00501) for r in ratios]


def test_gemma_in_readme():
    """The figures in the sentence about a model with few global layers."""
    text = " ".join((ROOT / "README.md").read_text().split())
    rows = {row["label"]: row for row in report("gemma3")["rows"]}
    share = {label: f"{row['kv']['share']:.0%}".replace("%", " %") for label, row in rows.items()}
    kl = {label: f"{row['metrics']['kl']['mean']:.4f}".removeprefix("0") for label, row in rows.items()}
    depth, uniform, q8_0 = "depth 0.4", "uniform 0.4", "kv-q8_0"
    assert f"leaves {share[depth]} of the bytes (divergence {kl[depth]} calibrated, {kl[uniform]} with equal" in text
    assert f"({share[q8_0]}, {kl[q8_0]})" in text


def test_sentences_in_readme():
    """What running text says of the tables."""
    text = " ".join((ROOT / "README.md").read_text().split())
    metrics = {row["label"]: row["metrics"] for row in report("smollm2")["rows"]}
    keys = {label: metric["multikey"]["log_prob"] for label, metric in metrics.items()}
    assert "40 % costs running text about as much again" in text and "makes a hidden key a third as likely" in text
    assert metrics["depth 0.4"]["kl"]["mean"] == pytest.approx(2 * metrics["noise"]["kl"]["mean"], rel=0.1)
    assert math.exp(keys["depth 0.4"] - keys["full"]) == pytest.approx(1 / 3, abs=0.03)
    assert "equal layers of that size make it two hundred times less likely" in text
    assert math.exp(keys["full"] - keys["uniform 0.4"]) == pytest.approx(200, rel=0.1)
    assert f"prefilled at {metrics['depth 0.4']['prefill']['ratio']:.2f}x with a calibrated 0.4" in text
    baseline = report("speed")["baseline"]
    assert "speed is within a percent" in text and baseline["identical_logits"]
    assert all(baseline[name]["ratio"] == pytest.approx(1, abs=0.01) for name in ("prefill", "decode"))
