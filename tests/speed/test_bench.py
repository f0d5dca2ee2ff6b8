"""Speed and memory side by side: what is measured, what the numbers come from, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import write_llama, write_mamba

from depthkv_edge import DepthKVError
from depthkv_edge.cli.bench import bench as command
from depthkv_edge.engine.library import library_dir
from depthkv_edge.measure.facts import LLAMA_CPP_COMMIT
from depthkv_edge.speed import pairs, rounds
from depthkv_edge.speed.bench_settings import BenchSettings, Sizes
from depthkv_edge.speed.bench_table import print_result
from depthkv_edge.speed.process import NO_BUDGET, STOCK, STOCK_FLASH, Configuration, ContextFacts, Worker
from depthkv_edge.speed.result import Baseline, BenchResult, PairRatio
from depthkv_edge.speed.rounds import bench
from depthkv_edge.speed.samples import (
    TimedStep,
    decode_samples,
    first_token_seconds,
    prefill_full_samples,
    prefill_samples,
)
from depthkv_edge.speed.schedule import DEPTHS, Schedule, Step, deal, make_schedule
from depthkv_edge.speed.timing import Latency, Timing, compare, fastest, speed

SIZES = Sizes(run=4, turn=2, prompt=512, pairs=1, pair_turns=2, pair_prefill=4, pair_decode=4, rest=0.0)
SMALL = BenchSettings(512, 1, budgets=(0.5,), repetitions=1, sizes=SIZES)
ARGUMENTS = ["smollm2", "-c", "512", "--budgets", "0.5", "--repetitions", "1", "--threads", "1", "--json"]
FULL = 30 * 512 * 2 * 192 * 2  # layers, cells, K and V, values, bytes of F16

quick = settings(deadline=None, max_examples=40)


@pytest.fixture(scope="module")
def run(smollm2: Path) -> tuple[BenchResult, Result]:
    """The command, with little to measure: its result, and what it said."""
    results = []

    def measure(model, settings, *rest, **more):
        results.append(bench(model, replace(settings, sizes=SIZES), *rest, **more))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "bench", measure)
        patch.setattr(sys, "argv", ["depthkv-edge", "bench", *ARGUMENTS])
        outcome = CliRunner().invoke(command, ARGUMENTS, catch_exceptions=False)
    return results[0], outcome


@pytest.fixture
def result(run) -> BenchResult:
    return run[0]


# --- a run --------------------------------------------------------------------------------------------------------


def test_command(run):
    """One JSON object on standard output, and nothing else anywhere."""
    result, outcome = run
    assert outcome.stderr == ""
    report = json.loads(outcome.stdout)
    assert report == json.loads(json.dumps(result.to_dict()))
    assert report["command"] == "depthkv-edge bench " + " ".join(ARGUMENTS)
    assert report["baseline"] == {"used": False, "directory": None, "identical_logits": None}
    model = report["model"]
    assert (model["architecture"], model["weights"], model["calibration"]) == ("llama", "Q4_1", None)
    assert (report["settings"]["n_ctx"], report["machine"]["threads"]) == (512, 1)
    rows = report["rows"]
    assert [row["label"] for row in rows] == [STOCK, STOCK_FLASH, "budget 0.5"]
    assert [row["library"] for row in rows] == ["this"] * 3
    assert [(row["flash_attn"], row["budget"], row["rule"]) for row in rows] == [
        (False, None, None),
        (True, None, None),
        ("auto", 0.5, "uniform"),
    ]
    for row in rows:
        speeds = [row["prefill"], row["prefill_full"], *row["decode"].values()]
        assert list(row["decode"]) == list(DEPTHS)
        assert all(s["tokens_per_second"] > 0 and 0 < s["low"] <= s["ratio"] <= s["high"] for s in speeds)
        assert row["first_token_seconds"] > 0
        for depth, latency in row["latency"].items():
            assert 0 < latency["p50"] <= latency["p99"] <= latency["max"] < 60
            assert latency["n"] == 4, depth


def test_kv_bytes_are_exact(result):
    assert [(row.kv_bytes, row.kv_share) for row in result.rows] == [(FULL, 1), (FULL, 1), (FULL // 2, 0.5)]


def test_kv_bytes_of_a_quantised_type(smollm2):
    with Worker(Configuration("", 0.5, "q8_0"), smollm2, replace(SMALL, n_ctx=500)) as worker:
        facts = worker.facts()
    assert facts.n_ctx == 512, "as llama.cpp rounds"
    assert facts.kv_bytes == FULL // 2 * 34 // 64, "32 values in 34 bytes"
    assert facts.kv_bytes_full == FULL, "of F16"


def test_every_budget_with_every_type():
    asked = BenchSettings(512, 1, budgets=(0.3, 0.6), types=("f16", "q8_0"))
    configured = rounds.configurations(asked, None)
    budgets = ["budget 0.3", "budget 0.3, q8_0", "budget 0.6", "budget 0.6, q8_0"]
    assert [of.label for of in configured] == [STOCK, STOCK_FLASH, *budgets], "no budget is stock itself"
    assert [(of.budget, of.type) for of in configured[2:]] == [(0.3, "f16"), (0.3, "q8_0"), (0.6, "f16"), (0.6, "q8_0")]
    assert [of.label for of in rounds.configurations(asked, Path("x"))] == [STOCK, STOCK_FLASH, NO_BUDGET, *budgets]


def test_memory_and_eviction(result):
    stock, _, ours = result.rows
    for row in result.rows:
        assert row.facts.peak_rss_bytes > result.model["bytes"] + row.kv_bytes
        assert row.facts.compute_bytes > 2**20
        assert (row.evict_share > 0) == (row.facts.scorer_bytes > 0) == (row is ours)
    assert ours.evict_share < 0.5 and ours.decode["empty"].evict_share == 0 < ours.prefill_full.evict_share
    # a smaller ubatch: logits of 32 tokens instead of 128
    assert ours.facts.n_ubatch < stock.facts.n_ubatch
    assert ours.facts.compute_bytes < stock.facts.compute_bytes / 2
    assert ours.facts.peak_rss_bytes < stock.facts.peak_rss_bytes


def test_each_is_compared_with_the_faster_stock_setting():
    """Without a budget, with the one that has the same kernels."""
    configured, schedule = rounds.configurations(SMALL, Path("unpatched")), make_schedule(512, SMALL)
    ours = "budget 0.5"
    seconds = {STOCK: (2, 1), STOCK_FLASH: (1, 2), NO_BUDGET: (2, 1), ours: (0.5, 0.25)}  # of a token: prefill, decode
    steps = {
        label: fake_turns(schedule, lambda p, x=prefill: x, lambda p, x=decode: x)
        for label, (prefill, decode) in seconds.items()
    }
    facts = dict.fromkeys(seconds, ContextFacts(512, 128, False, None, None, 0, 0, 0, None))
    facts[ours] = ContextFacts(512, 32, True, FULL // 2, FULL, 0, 0, 0, "uniform")
    found = list(rounds.rows(configured, schedule, steps, facts))
    assert [row.kv_share for row in found] == [1, 1, 1, 0.5]
    ratios = {
        row.configuration.label: [(of.against, of.ratio) for of in (row.prefill.against, row.decode["half"].against)]
        for row in found
    }
    assert ratios == {
        STOCK: [(STOCK_FLASH, 0.5), (STOCK, 1)],
        STOCK_FLASH: [(STOCK_FLASH, 1), (STOCK, 0.5)],
        NO_BUDGET: [(STOCK, 1), (STOCK, 1)],
        ours: [(STOCK_FLASH, 2), (STOCK, 4)],
    }
    assert found[-1].latency["full"] == Latency(0.25, 0.25, 0.25, schedule.runs * schedule.passes * schedule.run)


def test_different_logits_are_seen(smollm2, tokens):
    stock = Configuration(STOCK, flash_attn=False, library=library_dir())
    other = Configuration(NO_BUDGET, flash_attn=True)  # other kernels, other rounding
    compared = pairs.compare_builds(stock, other, smollm2, SMALL, tokens[:512], lambda n: None)
    assert not compared.identical_logits
    assert compared.is_patched, "it is our own library, which says nothing of stock"


def test_tables(result, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_result(result)
    said = capsys.readouterr().out
    assert "this library without a budget stands in for an unpatched build" in said and "--baseline" in said
    assert "carries no calibration" in said and "50.0%" in said and "bit-identical" not in said
    for row in result.rows:
        against = row.decode["half"].against
        assert f"{row.decode['half'].tokens_per_second:.1f}" in said
        assert f"{1e3 * row.latency['full'].max:.1f}" in said
        assert f"{against.low:.2f}-{against.high:.2f}" in said or against.against == row.configuration.label
    assert "…" not in said, "a column was cut"

    ratio = PairRatio(0.99, (0.985, 0.995), 0.98, 1.0, 10)
    for is_patched, identical, parts in (
        (False, False, ["unpatched build in /built", "logits NOT those of", "0.990x (95 % between 0.985 and 0.995)"]),
        (True, True, ["/built, which is not an unpatched build", "logits bit-identical to"]),
    ):
        print_result(replace(result, baseline=Baseline(Path("/built"), is_patched, identical, ratio, ratio)))
        said = capsys.readouterr().out
        assert all(part in said for part in parts), said


# --- processes ----------------------------------------------------------------------------------------------------


def test_a_worker_that_dies(smollm2):
    with Worker(Configuration("budget 0.5", 0.5), smollm2, SMALL) as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(DepthKVError, match="^budget 0.5: its process was killed, as happens when memory runs out"):
            worker.compute([1], one_by_one=False)


class FakeWorker:
    """Takes no time, and remembers who was asked for what."""

    asked: list[tuple[str, int, int, bool]] = []

    def __init__(self, configuration, model, settings):
        self.configuration, self.at = configuration, 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def clear(self):
        self.at = 0

    def compute(self, tokens, *, one_by_one):
        assert list(tokens) == list(range(self.at, self.at + len(tokens)))
        self.asked.append((self.configuration.label, self.at, len(tokens), one_by_one))
        self.at += len(tokens)
        return Timing(len(tokens), 1.0)

    def logits_sha256(self):
        return str(self.at)

    def facts(self):
        return ContextFacts(8192, 512, False, None, None, 0, 0, 0, None)


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(rounds, "Worker", FakeWorker)
    monkeypatch.setattr(pairs, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "asked", [])
    return FakeWorker.asked


def test_turns_alternate(asked):
    """No configuration always comes first, or always after the same other one."""
    asked_for, done = BenchSettings(8192, 2, repetitions=3), []
    schedule = make_schedule(8192, asked_for)
    configured = [Configuration(name) for name in "abc"]
    steps, _ = rounds._measure(configured, Path("m"), asked_for, schedule, range(8192), done.append)
    by_round = [asked[i : i + 3] for i in range(0, len(asked), 3)]
    assert ["".join(label for label, *_ in turn) for turn in by_round] == ["abc", "cba"] * (len(by_round) // 2)
    assert all(len({request[1:] for request in turn}) == 1 for turn in by_round), "all the same step"
    assert [turn.step for turn in steps["a"]] == [step for step in schedule.steps() if step is not None]
    assert sum(done) == 3 * rounds._cost(schedule), "the progress bar ends at 100 %"


def test_pairs_alternate(asked):
    asked_for, done = BenchSettings(8192, 2, repetitions=3), []
    stock, ours = Configuration("s", library=Path()), Configuration("o")
    baseline = pairs.compare_builds(stock, ours, Path("m"), asked_for, range(8192), done.append)
    assert baseline.prefill.n == baseline.decode.n == 6
    assert baseline.identical_logits
    order = "".join(label for label, *_ in asked)
    n = len(order) // 6
    assert order[:8] == "soossoos"
    assert order[n : 2 * n] == order[:n].translate(str.maketrans("so", "os")), "every other pair in reversed order"
    assert order == order[: 2 * n] * 3
    assert {n_tokens for *_, n_tokens, one_by_one in asked if one_by_one} == {1}
    assert sum(done) == pairs.pair_cost(asked_for), "the progress bar ends at 100 %"


def test_interval_of_pairs():
    """One pair in ten that was disturbed all its life neither moves the ratio nor hides behind it."""
    calm = [[0.99, 1.0, 1.01]] * 9
    result = pairs.pair_ratio([*calm, [1.2, 1.3, 1.4]])
    assert (result.ratio, result.low, result.high, result.n) == (1.0, 1.0, 1.3, 10)
    assert 0.99 <= result.interval[0] <= 1.0 <= result.interval[1] <= 1.01
    worse = pairs.pair_ratio([[r * 0.95 for r in pair] for pair in calm])
    assert worse.interval[1] < 1


def test_a_model_with_a_budget_of_its_own(tmp_path):
    """Without a budget means without one."""
    path = write_llama(tmp_path / "m.gguf", lambda writer: writer.add_float32("depthkv.budget", 0.5))
    with Worker(Configuration(STOCK, flash_attn=False), path, SMALL) as worker:
        facts = worker.facts()
    assert facts.rule is None and facts.kv_bytes == facts.kv_bytes_full


# --- numbers ------------------------------------------------------------------------------------------------------

seconds = st.floats(1e-3, 1e3)
pairs_of_seconds = st.lists(st.tuples(seconds, seconds), min_size=1, max_size=9)


@quick
@given(pairs_of_seconds, st.integers(1, 512), st.integers(1, 512), st.floats(0, 1))
def test_ratio(times, n_ours, n_theirs, evict_share):
    """Of what was measured side by side: noise that slows both down is not in it."""
    ours = [Timing(n_ours, t, evict_share * t) for t, _ in times]
    theirs = [Timing(n_theirs, t) for _, t in times]
    ratio = compare(ours, theirs, "stock")
    expected = [(n_ours / a) / (n_theirs / b) for a, b in times]
    assert ratio.ratio == pytest.approx(statistics.median(expected))
    assert (ratio.low, ratio.high) == pytest.approx((min(expected), max(expected)))
    assert (ratio.n, ratio.against) == (len(times), "stock")
    back = compare(theirs, ours, "ours")
    assert (back.low, back.high) == pytest.approx((1 / ratio.high, 1 / ratio.low))
    found = speed(ours, theirs, "stock")
    assert found.evict_share == pytest.approx(evict_share, abs=1e-9)
    if len(times) % 2:
        assert found.tokens_per_second == pytest.approx(statistics.median(n_ours / t for t, _ in times))


@quick
@given(st.lists(st.lists(seconds, min_size=1, max_size=40), min_size=1, max_size=9))
def test_latency(turns):
    """Of single tokens, over all turns."""
    found = Latency.of([Timing(len(turn), sum(turn), token_seconds=tuple(turn)) for turn in turns])
    everything = [token for turn in turns for token in turn]
    assert (found.p50, found.max, found.n) == (statistics.median(everything), max(everything), len(everything))
    assert sum(token > found.p99 for token in everything) <= len(everything) / 100
    assert sum(token >= found.p99 for token in everything) > len(everything) / 100


def test_fastest():
    slow, fast = [Timing(10, 9), Timing(10, 9), Timing(10, 1)], [Timing(10, 8), Timing(10, 8), Timing(10, 80)]
    assert fastest({"slow": slow, "fast": fast}) == "fast", "medians, not sums or extremes"


@quick
@given(st.integers(1, 200), st.integers(1, 50))
def test_deal(n, n_hands):
    hands = deal(n, n_hands)
    assert sorted(i for hand in hands for i in hand) == list(range(n))
    assert len(hands) == min(n, n_hands)
    if n % (2 * len(hands)) == 0:
        assert {statistics.mean(hand) for hand in hands} == {(n - 1) / 2}, "equally deep"


plans = st.builds(
    lambda n_ctx, repetitions, segment: make_schedule(
        n_ctx, BenchSettings(n_ctx, 1, repetitions=repetitions, sizes=Sizes(segment=segment))
    ),
    st.integers(512, 40_000),
    st.integers(1, 40),
    st.integers(16, 2048),
)


@quick
@given(plans)
def test_plan(schedule: Schedule):
    steps = list(schedule.steps())
    n_empty = schedule.n_decoded // schedule.turn
    assert steps[0] is None and steps[n_empty + 1] is None, "emptied at the start, and before the prompt"
    assert all(step.depth == "empty" for step in steps[1 : n_empty + 1])
    at = 0
    for step in steps[n_empty + 2 :]:
        assert step.start == at, "nothing is left out or computed twice"
        at = step.end
        assert 0 < step.n_tokens <= (schedule.turn if step.is_decode else schedule.segment)
    assert at == schedule.n_ctx
    for depth in DEPTHS:
        decoded = [step for step in steps if step is not None and step.depth == depth]
        assert decoded[0].start == schedule.depths[depth]
        assert sum(step.n_tokens for step in decoded) == schedule.runs * schedule.run
        assert schedule.runs * schedule.run <= schedule.n_ctx / 16
    assert schedule.n_prompt >= schedule.n_ctx * 15 / 16
    assert schedule.run % schedule.turn == 0


@quick
@given(st.integers(512, 40_000), st.integers(1, 40))
def test_enough_repetitions(n_ctx, repetitions):
    schedule = make_schedule(n_ctx, BenchSettings(n_ctx, 1, repetitions=repetitions))
    assert repetitions <= schedule.runs * schedule.passes < 2 * repetitions
    steps = fake_turns(schedule, lambda p: 1.0, lambda p: 1.0)
    n_segments = sum(not turn.step.is_decode for turn in steps)
    for samples in (prefill_samples(steps, schedule), prefill_full_samples(steps, schedule)):
        assert len(samples) >= min(repetitions, n_segments)


def fake_turns(schedule: Schedule, prefill, decode) -> list[TimedStep]:
    """Turns as if a token at position p took prefill(p) or decode(p) seconds."""

    def timing(step: Step) -> Timing:
        seconds = [(decode if step.is_decode else prefill)(p) for p in range(step.start, step.end)]
        return Timing(step.n_tokens, sum(seconds), token_seconds=tuple(seconds) if step.is_decode else ())

    steps = [step for step in schedule.steps() if step is not None]
    return [TimedStep(n, step, timing(step)) for n in range(schedule.passes) for step in steps]


@quick
@given(plans)
def test_samples_at_constant_speed(schedule: Schedule):
    steps = fake_turns(schedule, lambda p: 0.25, lambda p: 2.0)
    for samples, rate in (
        (prefill_samples(steps, schedule), 0.25),
        (prefill_full_samples(steps, schedule), 0.25),
        *((decode_samples(steps, schedule, depth), 2.0) for depth in DEPTHS),
    ):
        assert samples
        assert all(sample.seconds == pytest.approx(rate * sample.tokens) for sample in samples)
    assert sum(sample.tokens for sample in prefill_samples(steps, schedule)) == schedule.passes * sum(
        end - start for start, end in schedule.stretches()
    )
    for depth in DEPTHS:
        samples = decode_samples(steps, schedule, depth)
        assert len(samples) == schedule.runs * schedule.passes
        assert {sample.tokens for sample in samples} == {schedule.run}
    assert first_token_seconds(steps, schedule) == pytest.approx(0.25 * schedule.n_prompt + 2.0)


def test_samples_are_equally_deep():
    """A prompt that slows down as it grows still gives samples that agree, and a first token at its true time."""
    schedule = make_schedule(8192, BenchSettings(8192, 2))
    steps = fake_turns(schedule, lambda p: 1 + p / 4000, lambda p: 0.0)
    samples = [sample.seconds / sample.tokens for sample in prefill_samples(steps, schedule)]
    assert len(samples) >= 5
    assert max(samples) / min(samples) < 1.15
    true = sum(1 + p / 4000 for p in range(schedule.n_prompt))
    assert first_token_seconds(steps, schedule) == pytest.approx(true, rel=0.001)
    at_end = [sample.seconds / sample.tokens for sample in prefill_full_samples(steps, schedule)]
    assert len(at_end) >= 5 and min(at_end) > max(samples)


# --- facts --------------------------------------------------------------------------------------------------------


def test_commit_is_the_pinned_one():
    lock = Path(__file__).parents[2] / "native" / "llama.cpp.lock"
    assert LLAMA_CPP_COMMIT == json.loads(lock.read_text())["commit"]


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["smollm2", "--budgets", "0"], ["budget 0 ", "out of range"]),
        (["smollm2", "--budgets", "0.5,1"], ["budget 1 ", "out of range"]),
        (["smollm2", "--budgets", "nan"], ["budget nan", "out of range"]),
        (["smollm2", "--budgets", "much"], ["'much'", "0.3,0.6"]),
        (["smollm2", "--budgets", "0.3,,0.6"], ["--budgets '0.3,,0.6'", "0.3,0.6"]),
        (["smollm2", "--budgets", "0.3,0.3"], ["0.3 is given twice"]),
        (["smollm2", "--budgets", "0.05", "-c", "512"], ["budget 0.05: ", "floor", "--budgets", "-c"]),
        (["smollm2", "--types", "f16,q3"], ["'q3'", "q8_0"]),
        (["smollm2", "--types", "f16,f16"], ["f16 is given twice"]),
        (["smollm2", "-c", "511"], ["-c 511", "512"]),
        (["smollm2", "--repetitions", "0"], ["--repetitions 0"]),
        (["smollm2", "--threads", "0"], ["--threads 0"]),
        (["smollm2", "--prompt", "no-such.txt"], ["no-such.txt does not exist"]),
        (["smollm2", "--baseline", "no-such-directory"], ["no-such-directory", "scripts/build-baseline.sh"]),
        (["smollm2", "--baseline", "."], ["baseline . holds no libllama", "scripts/build-baseline.sh"]),
        (["no-such.gguf"], ["no-such.gguf does not exist"]),
    ],
)
def test_refused(arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(command, arguments)
    assert isinstance(outcome.exception, DepthKVError), outcome
    assert outcome.output == ""
    assert all(part in str(outcome.exception) for part in parts), outcome.exception


def test_text_that_is_too_short(smollm2, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    arguments = [str(smollm2), "-c", "512", "--prompt", str(tmp_path / "short.txt")]
    outcome = CliRunner().invoke(command, arguments)
    assert isinstance(outcome.exception, DepthKVError)
    assert "tokens, too few for a context of 512: give a longer one with --prompt" in str(outcome.exception)


def test_a_baseline_that_is_no_library(smollm2, text, tmp_path):
    for suffix in ("so", "dylib"):
        (tmp_path / f"libllama.{suffix}").write_bytes(b"not a library")
    with pytest.raises(DepthKVError, match="^stock: .*libllama"):
        bench(smollm2, SMALL, text, tmp_path)


@pytest.mark.parametrize("what", ["mamba", "cut"])
def test_a_model_that_cannot_be_measured(smollm2, text, tmp_path, what):
    path = tmp_path / "m.gguf"
    if what == "mamba":
        write_mamba(path)
    else:
        path.write_bytes(smollm2.read_bytes()[:-1000])
    with pytest.raises(DepthKVError) as error:
        bench(path, SMALL, text)
    assert ("'mamba'" if what == "mamba" else "m.gguf") in str(error.value)
    assert "\n" not in str(error.value)
