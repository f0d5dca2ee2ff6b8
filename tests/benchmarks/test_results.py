"""The pages of results say what the reports say."""

from __future__ import annotations

import json
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


def dot(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


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
        "stock llama.cpp, q8_0": "kv-q8_0",
        "stock llama.cpp, q4_0": "kv-q4_0",
        **{f"calibrated, {n}0 %": f"depth 0.{n}" for n in (2, 4, 6)},
        **{f"equal layers, {n}0 %": f"uniform 0.{n}" for n in (4, 6)},
    }
    table = readme_rows("texts that calibration did not see")
    assert {cells[0] for cells in table} == set(shown)
    for title, mib, kl, keys, decode in table:
        row = rows[shown[title]]
        metrics = row["metrics"]
        assert float(mib) == round(row["kv"]["bytes"] / 2**20, 1)
        if kl:
            assert kl == f"{dot(metrics['kl']['mean'])} ({dot(metrics['kl']['low'])}-{dot(metrics['kl']['high'])})"
        found = metrics["multikey"]
        numbers = [float(number) for number in re.findall(r"-\d+\.\d", keys)]
        if title == "full, F16":
            assert not kl and not numbers[3:]
        assert numbers == pytest.approx([found["log_prob"], found["low"], found["high"]], abs=0.0501)
        assert not decode or float(decode.rstrip("x")) == pytest.approx(metrics["decode"]["ratio"], abs=0.00501)


def test_sentences_in_readme():
    """What running text says of the tables."""
    text = " ".join((ROOT / "README.md").read_text().split())
    metrics = {row["label"]: row["metrics"] for row in report("smollm2")["rows"]}
    f32 = {row["label"]: row["metrics"]["kl"] for row in report("smollm2-f32")["rows"]}
    assert metrics["depth 0.6"]["kl"]["low"] < metrics["noise"]["kl"]["high"], "cannot be told"
    assert f32["depth 0.6"]["low"] > f32["noise"]["high"], "with F32 weights it can"
    ours, noise = (f"{f32[label]['mean']:.5f}".removeprefix("0") for label in ("depth 0.6", "noise"))
    assert f"({ours} against {noise})" in text
    assert f"prefilled at {metrics['depth 0.4']['prefill']['ratio']:.2f}x." in text
    baseline = report("speed")["baseline"]
    assert "bit for bit, at its speed" in text and baseline["identical_logits"]
    assert all(baseline[name]["ratio"] == pytest.approx(1, abs=0.01) for name in ("prefill", "decode"))


def test_gemma_in_readme():
    """The figures in the sentence about a model with few global layers."""
    text = " ".join((ROOT / "README.md").read_text().split())
    rows = {row["label"]: row for row in report("gemma3")["rows"]}
    keys = {label: row["metrics"]["multikey"]["log_prob"] for label, row in rows.items()}
    share = f"{rows['depth 0.4']['kv']['share']:.0%}".replace("%", " %")
    assert f"40 % leaves {share} of the bytes" in text
    assert f"(log-probability {keys['depth 0.4']:.1f}, full {keys['full']:.1f})" in text


def test_greedy_text_in_readme():
    text = " ".join((ROOT / "README.md").read_text().split())
    rows = {row["label"]: row["metrics"]["greedy"]["agreement"] for row in report("tasks")["rows"]}
    ours, noise, q8_0 = (f"{100 * rows[label]:.1f}".removesuffix(".0") for label in ("depth 0.4", "noise", "kv-q8_0"))
    assert f"{ours} % at 40 %, {noise} % for the second row of the table, {q8_0} % for q8_0" in text
