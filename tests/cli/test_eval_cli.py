"""`depthkv-edge eval` as a user meets it: numbers that repeat, interrupts, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import Outcome
from support.outcome import refused, run_here

from depthkv_edge.quality.eval_settings import EvalSettings
from depthkv_edge.quality.eval_table import print_report
from depthkv_edge.quality.evaluate import forget
from depthkv_edge.quality.store import Store
from depthkv_edge.quality.texts import Text

N_CTX = 512
SMALL = ("-c", N_CTX, "--threads", 1, "--budgets", "0.4", "--methods", "uniform,kv-q8_0", "--tasks", "language")


@pytest.fixture
def run(capfd) -> Callable[..., Outcome]:
    return partial(run_here, capfd, "eval")


def command(smollm2: Path, texts: list[str], *more: str) -> list[str]:
    """By its name the model would be fetched again, into the cache directory that a test has for itself."""
    return [sys.executable, "-m", "depthkv_edge", "eval", str(smollm2), *texts, *map(str, SMALL), *more]


@pytest.fixture(scope="module")
def texts(text: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name two texts, of about two windows each."""
    directory = tmp_path_factory.mktemp("texts")
    for i, name in enumerate(("one", "two")):
        (directory / f"{name}.txt").write_text(text[20_000 * i :][:5_000])
    return ["--text", str(directory / "one.txt"), "--text", str(directory / "two.txt")]


@pytest.fixture(scope="module")
def report(cli, smollm2, texts, tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("report")
    files = ("--html", directory / "page.html", "--plot", directory / "plots")
    outcome = cli("eval", smollm2, *texts, *SMALL, "--json", *files, XDG_CACHE_HOME=str(directory))
    report = outcome.json()
    estimate, *lines = lines_of(outcome.err)
    assert re.fullmatch("4 rows, 4,096 tokens: some \\d+ (s|min)", estimate)
    places = [f"{name}.txt, window 1 of 1" for name in ("one", "two")]
    labels = ["full", "noise", "uniform 0.4", "kv-q8_0"]
    assert [line.split(":")[0] for line in lines] == [f"{place}, {label}" for place in places for label in labels]
    assert all(re.search(": KL .*; top-1 % .*; prefill .*; decode ", line) for line in lines)
    assert (directory / "page.html").read_text().startswith("<!doctype html>")
    assert list((directory / "plots").iterdir())
    assert not list(directory.rglob("*.jsonl")), "what has been reported is no longer kept"
    return report


def lines_of(err: str) -> list[str]:
    """What stays on standard error, without how far it is once a minute."""
    return [line for line in err.splitlines() if not re.search(r": \d+ (s|min)($|, \d+% done)", line)]


def rows_of(report: dict) -> dict[str, dict]:
    return {row["label"]: row for row in report["rows"]}


def test_rows_and_what_they_hold(report):
    rows = rows_of(report)
    assert list(rows) == ["full", "noise", "uniform 0.4", "kv-q8_0"]
    shares = {label: row["kv"]["share"] for label, row in rows.items()}
    assert shares == {"full": 1, "noise": 1, "uniform 0.4": pytest.approx(0.4, abs=1e-3), "kv-q8_0": 34 / 64}
    assert {row["kv"]["tokens_seen"] for row in rows.values()} == {N_CTX}
    held = rows["uniform 0.4"]["kv"]["held"]
    assert held["min"] <= held["mean"] <= held["max"] and held["mean"] == pytest.approx(0.4 * N_CTX, abs=32)
    assert rows["kv-q8_0"]["kv"]["held"] == {"mean": N_CTX, "min": N_CTX, "max": N_CTX}


def test_metrics(report):
    rows = rows_of(report)
    kl = {label: row["metrics"]["kl"]["mean"] for label, row in rows.items()}
    assert kl["full"] == 0 < kl["noise"] < kl["uniform 0.4"] and kl["kv-q8_0"] < kl["uniform 0.4"]
    for row in rows.values():
        metrics = row["metrics"]
        assert metrics["kl"]["low"] <= metrics["kl"]["mean"] <= metrics["kl"]["high"]
        assert metrics["kl"]["n"] == metrics["top1"]["n"] == metrics["perplexity"]["n"] == 2 * (N_CTX // 2 - 1)
        assert sum(metrics["kl"]["by_text"].values()) / 2 == pytest.approx(metrics["kl"]["mean"])
        assert metrics["prefill"]["tokens_per_second"] > 0
        assert metrics["decode"]["tokens_per_second"] > 0
    assert rows["full"]["metrics"]["perplexity"]["ratio"] == rows["full"]["metrics"]["top1"]["share"] == 1
    assert rows["full"]["metrics"]["prefill"]["ratio"] == rows["full"]["metrics"]["decode"]["ratio"] == 1


def test_what_was_measured_can_be_told_from_the_report(report):
    assert re.match(r"depthkv-edge eval \S+\.gguf --text", report["command"])
    assert report["model"]["weights"] == "Q4_1" and report["model"]["reference"] == "native"
    assert [text["name"] for text in report["settings"]["texts"]] == ["one.txt", "two.txt"]
    assert all(len(text["sha256"]) == 64 for text in report["settings"]["texts"])
    assert len(report["engine"]["library_sha256"]) == 64


def test_the_same_seed_gives_the_same_numbers_even_through_an_interrupt(report, smollm2, texts, tmp_path):
    """The second run is killed after its first row; a third goes on from there."""
    asked = command(smollm2, texts, "--json")
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.Popen(asked, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not any(path.stat().st_size for path in tmp_path.rglob("*.jsonl")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"one.txt, window 1 of 1, full: KL 0" in err and b"Traceback" not in err
    (left,) = tmp_path.rglob("*.jsonl")
    done = [json.loads(line)[0] for line in left.read_text().splitlines()]
    assert 0 < len(done) < 8  # of two windows and four rows

    rest = subprocess.run(asked, env=env, capture_output=True, check=True, timeout=300, text=True)
    again = json.loads(rest.stdout)
    assert len(lines_of(rest.stderr)) == 1 + 8 - len(done), "what was measured is not measured again"
    for before, after in zip(report["rows"], again["rows"], strict=True):
        for metric, number in ("kl", "mean"), ("perplexity", "ratio"):
            expected = before["metrics"][metric][number]
            assert after["metrics"][metric][number] == pytest.approx(expected, abs=1e-6)


def test_what_an_interrupted_evaluation_left_outlives_a_smaller_one(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = EvalSettings(smollm2, (Text("one", "text"),), N_CTX, (0.4,), ("uniform",), ("language",))
    path = tmp_path / "depthkv-edge" / "eval" / f"{settings.key()}.jsonl"
    store = Store(path)
    store["full"], store["uniform"] = {}, {}
    forget(settings, {"full"})
    assert set(Store(path)) == {"full", "uniform"}
    forget(settings, {"full", "uniform", "kv-q8_0"})
    assert not path.exists()


def test_the_table(report, capsys):
    print_report(report)
    out = capsys.readouterr().out
    assert all(label in out for label in ("full", "noise", "uniform 0.4", "kv-q8_0", "Q4_1 weights", "0.40"))


def test_quick_is_one_text_and_few_rows(run):
    """With its own methods it needs a calibrated model; what is given by hand replaces its choice."""
    arguments = ("-c", 256, "--threads", 1, "--methods", "kv-q8_0", "--quick", "--restart", "--json")
    report = run("smollm2", *arguments).json()
    assert list(rows_of(report)) == ["full", "noise", "kv-q8_0"]
    assert report["settings"]["budgets"] == [0.4] and report["settings"]["tasks"] == ["language"]
    assert [text["name"] for text in report["settings"]["texts"]] == ["scripture"]
    assert "which method depth needs" in refused(run("smollm2", "--quick"))


def test_questions_of_a_file(run, smollm2, texts, tmp_path):
    rows = [
        {"question": f"What colour has the {thing}?", "answers": [colour], "text": f"The {thing} is {colour}. " * 3}
        for thing, colour in (("barn", "red"), ("door", "green"), ("gate", "blue"), ("roof", "black"))
    ]
    path = tmp_path / "colours.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    asked = [*texts, "-c", N_CTX, "--tasks", "qa", "--methods", "streaming", "--budgets", "0.5", "--items", "1"]
    result = run(smollm2, *asked, "--questions", path, "--json")
    report = json.loads(result.out)
    assert report["settings"]["questions"][0]["name"] == "colours.jsonl"
    for row in report["rows"]:
        assert row["metrics"]["qa"]["n"] == 4 and 0 <= row["metrics"]["qa"]["f1"] <= 1
    assert report["rows"][0]["metrics"]["qa"]["f1_share"] == 1
    assert "QA F1" in run(smollm2, *asked, "--questions", path).out


def test_a_disk_without_room_is_said_in_one_line(smollm2, texts, tmp_path):
    """Predictions of the full cache are what takes room: 50 MB here."""
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    limited = ["sh", "-c", 'ulimit -f 2048 && exec "$@"', "sh", *command(smollm2, texts)]
    done = subprocess.run(limited, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    *_, last = done.stderr.splitlines()
    assert last.startswith("depthkv-edge: cannot keep predictions of the full cache in ") and "File too large" in last


def test_lists_of_methods_and_tasks(run):
    assert "kv-q4_0" in run("smollm2", "--methods", "help").out
    assert "language" in run("smollm2", "--tasks", "help").out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "snapkv"], "method 'snapkv' is not known"),
        (["--tasks", "poetry"], "task 'poetry' is not known"),
        (["--budgets", "0.4,much"], "no list of numbers"),
        (["--budgets", "1.2"], "budget 1.2 is out of range"),
        (["--budgets", ""], "--budgets is empty"),
        (["--methods", "kv-q8_0", "--windows", "9"], "tokens, 9 x 512 are needed"),
        (["-c", "16"], "-c 16 is too small"),
        (["--quick", "--full"], "--quick and --full contradict each other"),
        (["--text", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--html", "nowhere/page.html"], "directory does not exist"),
        (["--tasks", "qa"], "task qa has no questions: give --questions FILE"),
        (["--tasks", "language", "--questions", "q.json"], "q.json are for the task qa: add it to --tasks"),
        (["--questions", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, smollm2, texts, tmp_path, monkeypatch, arguments, says):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert says in refused(run(smollm2, *texts, "-c", N_CTX, *arguments))
