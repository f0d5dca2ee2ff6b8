"""The comparison with kvpress, without kvpress: ours in its regime, the items, the table."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.tiny_hf import make_model, make_tokens
from transformers import DynamicCache

from benchmarks.peers import bounded, oneshot
from benchmarks.peers.__main__ import check_settings, main
from benchmarks.peers.export import write_reference
from benchmarks.peers.generate import make_retrievals, make_windows
from benchmarks.peers.plan import (
    BOUNDED,
    FULL,
    KVPRESS,
    ONCE,
    Plan,
    Question,
    Retrieval,
    Window,
    one_pass_cells,
    record_key,
)
from benchmarks.peers.score import ask, score_tail
from benchmarks.peers.table import build_report, lines, print_report
from depthkv_edge.calibrate.attention import AttentionCall, attend, observe
from depthkv_edge.calibrate.scorers import mass_of
from depthkv_edge.calibrate.target import inspect_model
from depthkv_edge.calibrate.window import _attention_of
from depthkv_edge.engine.model import Model, load_model
from depthkv_edge.engine.rules import N_RECENT, N_SINK
from depthkv_edge.engine.sim import simulate
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.keys import Calibration
from depthkv_edge.quality.store import Store
from depthkv_edge.quality.texts import Text

N_PROMPT, N_TAIL = 300, 40
TOKENS = make_tokens(N_PROMPT + N_TAIL)
PROMPT, TAIL = TOKENS[:N_PROMPT], TOKENS[N_PROMPT:]


@functools.cache
def target():
    return inspect_model(make_model("llama"))


@functools.cache
def prompt():
    return oneshot.read_prompt(target(), PROMPT)


@functools.cache
def full_logits() -> torch.Tensor:
    """Of the tail, in one pass over everything."""
    with torch.no_grad():
        return target().logits(target().hidden(torch.tensor([TOKENS]), target().new_cache())[N_PROMPT:])


# --- one eviction after the prompt ----------------------------------------------------------------------------------


def test_everything_kept_is_the_full_cache():
    everything = oneshot.keep(prompt(), "attention", [N_PROMPT] * 4)
    logits = oneshot.predict(prompt(), everything, TAIL)
    torch.testing.assert_close(logits, full_logits(), rtol=1e-4, atol=1e-4)
    assert max(score_tail(logits, oneshot.predict(prompt(), everything, TAIL), TAIL)["kl"]) == 0


@pytest.mark.parametrize("scorer", ["attention", "streaming"])
def test_keeps_exactly_the_cells_asked_for(scorer):
    asked = [300, 120, 80, 217]
    kept = oneshot.keep(prompt(), scorer, asked)
    assert [len(pos) for pos in kept] == asked
    for pos in kept:
        assert (np.diff(pos) > 0).all()
        n_recent = len(pos) - N_SINK if scorer == "streaming" else N_RECENT
        assert {*range(N_SINK), *range(N_PROMPT - n_recent, N_PROMPT)} <= set(pos.tolist())
    assert len(oneshot.keep(prompt(), scorer, asked)[0]) == 300  # the prompt stays whole for the next


def test_a_mask_is_an_eviction():
    kept = oneshot.keep(prompt(), "attention", [110] * 4)
    cache = DynamicCache(config=target().model.config)
    for layer, (pos, whole) in enumerate(zip(kept, prompt().cache.layers, strict=True)):
        cache.update(whole.keys[:, :, pos], whole.values[:, :, pos], layer)

    def causal(call: AttentionCall) -> torch.Tensor:
        n, m = call.query.shape[2], call.key.shape[2]
        assert (n, m) == (N_TAIL, 110 + N_TAIL)
        return attend(call, torch.ones(1, 1, n, m, dtype=torch.bool).tril(m - n))

    position_ids = torch.arange(N_PROMPT, N_PROMPT + N_TAIL)[None]
    with torch.no_grad(), observe(causal):
        hidden = (
            target()
            .decoder(input_ids=torch.tensor([TAIL]), past_key_values=cache, position_ids=position_ids, use_cache=True)
            .last_hidden_state[0]
        )
        expected = target().logits(hidden)
    logits = oneshot.predict(prompt(), kept, TAIL)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.mean(score_tail(full_logits(), logits, TAIL)["kl"]) > 1e-4  # and it matters


def test_cells_are_judged_as_the_engine_judges_before_its_first_eviction():
    n_tokens = 896
    tokens = make_tokens(n_tokens, seed=3)
    judged = oneshot.read_prompt(target(), tokens).judged[2]
    calls: dict[int, AttentionCall] = {}

    def watch(call: AttentionCall) -> torch.Tensor:
        calls[call.layer] = call
        return attend(call)

    with torch.no_grad(), observe(watch):
        target().hidden(torch.tensor([tokens]), target().new_cache())
    attention_of = _attention_of(calls[2], (np.arange(n_tokens), calls[2].query[0]), mass_of("attention"))
    counted = []

    def record(queries: np.ndarray, cells: np.ndarray) -> np.ndarray:
        counted.append(attention_of(queries, cells))
        return counted[-1]

    # a layer of as many cells as the prompt has tokens evicts when the next ubatch comes
    simulate("attention", 2, n_tokens + 128, n_tokens, 128, record)
    masses = [mass for _, mass in judged.passes if mass is not None]
    assert len(masses) == len(counted) == 5
    for ours, engine in zip(masses, counted, strict=True):
        np.testing.assert_allclose(ours, engine, rtol=1e-4, atol=1e-6)


def test_a_prompt_of_any_length_is_judged_to_its_end():
    for n_tokens in (70, 300, 640, 700):
        (judged, *_) = oneshot.read_prompt(target(), make_tokens(n_tokens)).judged
        assert sum(n for n, _ in judged.passes) == n_tokens
        assert (judged.passes[-1][1] > 0).all()  # the last token sees itself


def calibration(rule: str = "optimal") -> Calibration:
    curves = np.array([[4.0, 1, 0.1], [0.04, 0.01, 0.001], [0.4, 0.1, 0.01], [0.04, 0.01, 0.001]], np.float32)
    facts = {"scorer": "attention", "sink_tokens": 4, "recent_tokens": 32, "rule": rule, "model": "m", "corpus": "c"}
    numbers = {"tokens": 1, "windows": 1, "window_tokens": 1, "stability": 1.0, "gain": 1.0}
    return Calibration((0, 1, 2, 3), (0.1, 0.3, 0.7), curves, curves * 0, **facts, **numbers, method="exact", tool="t")


@pytest.mark.parametrize("ratio", [0.23, 0.4, 0.6])
def test_allocations_have_the_tokens_that_kvpress_keeps(ratio):
    n = int(1000 * ratio)
    assert oneshot.allocate(calibration(), "uniform", ratio, 1000) == [n] * 4
    assert oneshot.allocate(calibration(), "streaming", ratio, 1000) == [n] * 4
    depth = oneshot.allocate(calibration(), "depth", ratio, 1000)
    assert sum(depth) <= 4 * n < sum(depth) + 32
    assert depth[0] > n > depth[1]
    assert oneshot.allocate(calibration("uniform"), "depth", ratio, 1000) == [n] * 4


def test_measures_everything_once(tmp_path):
    window = Window("text", TOKENS, N_PROMPT)
    asked = Retrieval("text", PROMPT, [Question("multikey", TAIL[:5], TAIL[5:8]), Question("passkey", TAIL[:4], [7])])
    plan = make_plan(windows=[window], retrievals=[asked], ratios=[0.3, 0.6], n_layers=4)
    store = Store(tmp_path / "ours.jsonl")
    oneshot.measure(target(), calibration(), plan, store)
    assert len(store) == 2 * (1 + 3 * 2)
    assert plan.missing(store, ONCE, oneshot.METHODS) == []
    full, pruned = (store[record_key(window, ONCE, *line)] for line in ((FULL, 1.0), ("uniform", 0.3)))
    assert full["kl"] == [0.0] * (N_TAIL - 1) and all(full["top1"])
    assert pruned["cells"] == one_pass_cells([90] * 4, N_PROMPT, N_TAIL)
    answers = store[record_key(asked, ONCE, FULL, 1.0)]["log_prob"]
    kept = oneshot.keep(prompt(), "attention", [N_PROMPT] * 4)
    logits = oneshot.predict(prompt(), kept, TAIL[:4]).log_softmax(dim=-1)
    assert answers[1] == pytest.approx(float(logits[3, 7]), abs=1e-4)


# --- metrics and memory ---------------------------------------------------------------------------------------------


def test_score_of_a_tail():
    full = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
    pruned = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]]))
    record = score_tail(full, pruned, [0, 1, 2])
    assert record["kl"] == pytest.approx([0.25 * math.log(2), 0], abs=1e-6)
    assert record["nll"] == pytest.approx([math.log(2), math.log(10)], rel=1e-6)
    assert record["top1"] == [0, 1]


def test_an_answer_is_scored_at_the_tokens_before_it():
    table = torch.tensor([[0.1, 0.1, 0.8], [0.1, 0.7, 0.2], [0.6, 0.2, 0.2]]).log()
    item = Retrieval("text", [0], [Question("multikey", [0, 1], [1, 0]), Question("multikey", [1], [1])])
    record = ask(item, lambda tokens: torch.cat([table, table])[: len(tokens)])
    assert record["log_prob"] == pytest.approx([math.log(0.7 * 0.6), math.log(0.1)], rel=1e-5)
    assert record["exact"] == [True, False]


def test_cells_of_one_pass():
    assert one_pass_cells([10, 40, 20], 100, 5) == {"held": [10, 40, 20], "peak": 150, "prompt": 70, "end": 85}
    assert one_pass_cells([90, 90], 100, 50)["peak"] == 280  # more at the end than while the prompt is read


# --- items ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[Model]:
    with load_model(smollm2, 1) as model:
        yield model


def test_items_from_texts(model: Model, text: str):
    texts = [Text("one", text), Text("two", text[5000:])]
    windows = make_windows(model, texts, 512, 384, 2)
    assert [window.text for window in windows] == ["one", "one", "two", "two"]
    assert all((window.n_prompt, window.n_tail, len(window.tokens)) == (384, 128, 512) for window in windows)
    assert len({window.key for window in windows}) == 4

    retrievals = make_retrievals(model, texts, 1024, 3, 5)
    assert [item.text for item in retrievals] == ["one", "two", "one"]
    for item in retrievals:
        assert item.n_prompt + item.n_tail == 1024
        assert sorted(question.metric for question in item.questions) == ["multikey"] * 5 + ["passkey"]
        context = model.detokenize(item.prompt)
        for question in item.questions:
            assert model.detokenize(question.question) not in context
            assert model.detokenize(question.answer).strip() in context
    assert make_retrievals(model, texts, 1024, 3, 5) == retrievals


def test_a_plan_survives_its_file_and_what_is_stored_is_not_missing(tmp_path):
    asked = Retrieval("text", [1, 2], [Question("passkey", [3], [4, 5])])
    plan = make_plan(windows=[Window("text", [1, 2, 3], 2)], retrievals=[asked])
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    assert plan.probe == [1, 2, 3]
    plan = make_plan(windows=plan.windows, ratios=[0.2, 0.4])
    store = Store(tmp_path / "records.jsonl")
    store[record_key(plan.windows[0], KVPRESS, "SnapKV", 0.2)] = {}
    missing = [("SnapKV", 0.4), ("KeyDiff", 0.2), ("KeyDiff", 0.4)]
    assert plan.missing(store, KVPRESS, ["SnapKV", "KeyDiff"]) == [(plan.windows[0], missing)]
    assert plan.missing(store, KVPRESS, []) == []


def test_reference_logits(tmp_path):
    path = tmp_path / "reference.npz"
    write_reference(target(), TOKENS, path)
    with np.load(path) as reference:
        positions, logits = reference["positions"], reference["logits"]
    assert positions[0] == 0 and positions[-1] == len(TOKENS) - 1
    late = positions >= N_PROMPT
    np.testing.assert_allclose(logits[late], full_logits()[positions[late] - N_PROMPT], rtol=1e-4, atol=1e-4)


# --- the engine -----------------------------------------------------------------------------------------------------


def test_budgets_beside_a_keep_ratio():
    window, asked = Window("text", [0] * 4096, 3072), Retrieval("text", [0] * 4000, [Question("k", [0] * 90, [0] * 6)])
    assert bounded.budgets(window, 0.2) == (pytest.approx(0.4), 0.2)
    assert bounded.budgets(asked, 0.2) == (pytest.approx((800 + 96) / 4096),)


def test_the_engine_stays_bounded(model: Model, text: str, tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, "METHODS", ("uniform",))
    (window,) = make_windows(model, [Text("text", text)], 256, 192, 1)
    plan = make_plan(windows=[window], ratios=[0.4])
    store = Store(tmp_path / "ours.jsonl")
    bounded.measure(model, model.path, plan, store)
    full = store[record_key(window, BOUNDED, FULL, 1.0)]
    assert full["kl"] == [0.0] * 63 and full["cells"]["end"] == 30 * 256
    for budget in bounded.budgets(window, 0.4):
        record = store[record_key(window, BOUNDED, "uniform", budget)]
        assert 0.9 * budget < record["cells"]["peak"] / (30 * 256) <= budget
        assert np.mean(record["kl"]) > 1e-3
        assert max(record["cells"]["held"]) <= 192
    before = len(store)
    bounded.measure(model, model.path, plan, store)
    assert len(store) == before == 3


# --- the table ------------------------------------------------------------------------------------------------------


def make_plan(**facts) -> Plan:
    defaults = {"windows": [], "retrievals": [], "presses": ["SnapKV", "StreamingLLM"], "ratios": [0.5], "n_layers": 2}
    return Plan(model="", reference="", records="", cell_bytes=1024, n_threads=1, **(defaults | facts))


def stored(plan: Plan) -> dict[str, dict]:
    """Records of every line: the full cache loses nothing, the others 0.1 nats, and half of their top tokens."""
    records = {}
    for item in plan.items:
        for line in lines(plan, 2 if isinstance(item, Window) else 1):
            full = line.method == FULL
            kept = [item.n_prompt] * 2 if full else [3, 5]
            record: dict = {"cells": one_pass_cells(kept, item.n_prompt, item.n_tail)}
            if isinstance(item, Window):
                n = item.n_tail - 1
                kl, nll, top1 = ([0.0] * n, [2.0] * n, [1] * n) if full else ([0.1] * n, [2.5] * n, [0, 1] * (n // 2))
                record |= {"kl": kl, "nll": nll, "top1": top1}
            else:
                record |= {"log_prob": [-1.0 if full else -3.0] * 2, "exact": [full, False]}
            records[record_key(item, line.regime, line.method, line.share(item))] = record
    return records


@pytest.fixture
def plan() -> Plan:
    asked = Retrieval("b", [1] * 20, [Question("multikey", [3] * 3, [4]), Question("passkey", [3], [4])])
    return make_plan(windows=[Window("a", [1] * 25, 8), Window("b", [2] * 25, 8)], retrievals=[asked])


def test_report_from_stored_records(plan: Plan, capsys):
    report = build_report(plan, stored(plan).__getitem__)
    found = [(row["regime"], row["method"], round(row["budget"], 4)) for row in report["windows"]]
    same = round((0.5 * 8 + 17) / 256, 4)
    assert found[:5] == [(r, FULL, 1.0) for r in (KVPRESS, ONCE, BOUNDED)] + [
        (KVPRESS, "SnapKV", 0.5),
        (KVPRESS, "StreamingLLM", 0.5),
    ]
    assert found[8:] == [(BOUNDED, method, b) for b in (same, 0.5) for method in ("depth", "uniform", "streaming")]
    row = report["windows"][3]
    assert row["kv"]["held"] == {"mean": 4, "min": 3, "max": 5, "layers": [3, 5]}
    # at its peak, the second layer is whole while the prompt is read; then both grow
    assert row["kv"]["bytes"] == {"peak": 42 * 1024, "prompt": 8 * 1024, "end": 42 * 1024}
    assert row["kv"]["share"]["end"] == pytest.approx(42 / 50)
    metrics = row["metrics"]
    assert metrics["kl"]["mean"] == pytest.approx(0.1) and metrics["kl"]["by_text"].keys() == {"a", "b"}
    assert metrics["perplexity"]["ratio"] == pytest.approx(math.exp(0.5))
    assert metrics["top1"] == {"share": 0.5, "n": 32}
    answers = report["retrievals"][3]["metrics"]
    assert answers["multikey"]["log_prob"] == answers["passkey"]["log_prob"] == -3.0
    assert report["retrievals"][0]["metrics"]["multikey"]["exact"] == 1
    assert len(report["retrievals"]) == 3 + 2 + 3 + 3
    facts = {"settings": {"prompt_tokens": 8, "tail_tokens": 17, "keys": 1}, "versions": {"kvpress": "0.5.5"}}
    print_report(report | facts | {"model": {"name": "a model"}})
    printed = capsys.readouterr().out
    for text in ("kvpress SnapKV", "ours depth", "bounded 0.08", "0.1000 (0.1000-0.1000)", "1.649", "-3.00"):
        assert text in printed
    assert "…" not in printed, "nothing is cut off"


@pytest.mark.parametrize(("regime", "method"), [(ONCE, FULL), (BOUNDED, FULL), (ONCE, "streaming")])
def test_lines_that_should_agree_and_do_not(plan: Plan, regime: str, method: str):
    records = stored(plan)
    wrong = records[record_key(plan.windows[1], regime, method, 1.0 if method == FULL else 0.5)]
    wrong["nll"] = [x + 0.5 for x in wrong["nll"]]
    with pytest.raises(DepthKVError, match="do not run the same model"):
        build_report(plan, records.__getitem__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smollm2"], "carries no calibration"),
        (["missing.gguf"], "missing.gguf"),
        (["smollm2", "--ratios", "0.2,many"], "no list of numbers"),
    ],
)
def test_what_cannot_be_compared(arguments, message):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": [0.2, 1.0]}, "between 0 and 1"),
        ({"ratios": []}, "--ratios is empty"),
        ({"presses": ["Snap"]}, "'Snap' is not known"),
        ({"windows": 0, "contexts": 0}, "nothing to measure"),
        ({"keys": 25}, "from 1 to 24"),
        ({"threads": -1}, "--threads -1"),
    ],
)
def test_settings_out_of_range(change, message):
    settings = {"texts": ["code"], "ratios": [0.2], "presses": ["SnapKV"], "windows": 1, "contexts": 1, "keys": 1}
    check_settings(settings | {"threads": 1}, 4096)
    with pytest.raises(DepthKVError, match=message):
        check_settings(settings | {"threads": 1} | change, 4096)
    with pytest.raises(DepthKVError, match="multiple of 256"):
        check_settings(settings | {"threads": 1}, 1000)
