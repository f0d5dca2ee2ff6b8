"""Speed and memory side by side: what is measured, what the numbers come from, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import Outcome, run_python
from hypothesis import given
from hypothesis import strategies as st

from depthkv_edge import DepthKVError
from depthkv_edge.cli.bench import bench as command
from depthkv_edge.engine import capi
from depthkv_edge.engine.library import library_dir
from depthkv_edge.measure.facts import LLAMA_CPP_COMMIT, engine_facts, machine_facts, model_facts
from depthkv_edge.speed import pairs, rounds
from depthkv_edge.speed.bench_settings import BenchSettings, Sizes
from depthkv_edge.speed.bench_table import print_result
from depthkv_edge.speed.process import NO_BUDGET, STOCK, STOCK_FLASH, Configuration, ContextFacts, Worker
from depthkv_edge.speed.result import BenchResult
from depthkv_edge.speed.rounds import bench
from depthkv_edge.speed.samples import (
    TimedStep,
    decode_samples,
    first_token_seconds,
    prefill_full_samples,
    prefill_samples,
)
from depthkv_edge.speed.schedule import DEPTHS, Schedule, deal, make_schedule
from depthkv_edge.speed.timing import Timing, compare, fastest, speed

SMALL = BenchSettings(
    n_ctx=500,
    n_threads=1,
    budgets=(0.5,),
    repetitions=1,
    sizes=Sizes(run=4, turn=2, prompt=512, pairs=1, pair_turns=2, pair_prefill=4, pair_decode=4, rest=0.0),
)
SMALL_512 = replace(SMALL, n_ctx=512)


@pytest.fixture(scope="module")
def result(smollm2: Path, text: str) -> BenchResult:
    """Against our own library, standing in for an unpatched build, which takes minutes to make."""
    return bench(smollm2, SMALL_512, text, library_dir())


# --- a run --------------------------------------------------------------------------------------------------------


def test_rows(result):
    labels = [row.configuration.label for row in result.rows]
    assert labels == [STOCK, STOCK_FLASH, NO_BUDGET, "budget 0.5"]
    records = result.to_dict()["rows"]
    assert [record["library"] for record in records] == ["stock", "stock", "this", "this"]
    assert [record["flash_attn"] for record in records] == [False, True, False, "auto"]
    assert [record["budget"] for record in records] == [None, None, None, 0.5]
    assert [record["rule"] for record in records] == [None, None, None, "uniform"]
    for record in records:
        speeds = [record["prefill"], record["prefill_full"], *record["decode"].values()]
        assert list(record["decode"]) == list(DEPTHS)
        assert all(s["tokens_per_second"] > 0 and 0 < s["low"] <= s["ratio"] <= s["high"] for s in speeds)
        assert record["first_token_seconds"] > 0


def test_every_budget_with_every_type():
    settings = BenchSettings(512, 1, budgets=(0.3, 0.6), types=("f16", "q8_0"))
    configured = rounds.configurations(settings, None)
    budgets = ["budget 0.3", "budget 0.3, q8_0", "budget 0.6", "budget 0.6, q8_0"]
    assert [of.label for of in configured] == [STOCK, STOCK_FLASH, *budgets], "no budget is stock itself"
    assert [(of.budget, of.type) for of in configured[2:]] == [(0.3, "f16"), (0.3, "q8_0"), (0.6, "f16"), (0.6, "q8_0")]
    assert [of.label for of in rounds.configurations(settings, Path("x"))] == [STOCK, STOCK_FLASH, NO_BUDGET, *budgets]


FULL = 30 * 512 * 2 * 192 * 2  # layers, cells, K and V, values, bytes of F16


def test_kv_bytes_are_exact(result):
    assert [row.kv_bytes for row in result.rows] == [FULL, FULL, FULL, FULL // 2]
    assert [row.kv_share for row in result.rows] == [1, 1, 1, 0.5]


def test_kv_bytes_of_a_quantised_type(smollm2):
    with Worker(Configuration("", 0.5, "q8_0"), smollm2, SMALL_512) as worker:
        facts = worker.facts()
    assert facts.kv_bytes == FULL // 2 * 34 // 64, "32 values in 34 bytes"
    assert facts.kv_bytes_full == FULL, "of F16"


def test_eviction_is_accounted_for(result):
    for row in result.rows:
        if row.configuration.budget is None:
            assert row.evict_share == 0
            assert row.facts.scorer_bytes == 0
        else:
            assert 0 < row.evict_share < 0.5
            assert row.decode["empty"].evict_share == 0
            assert row.prefill_full.evict_share > 0
            assert row.facts.scorer_bytes > 0


def test_memory(result):
    rows = {row.configuration.label: row for row in result.rows}
    weights = result.model["bytes"]
    for row in rows.values():
        assert row.facts.peak_rss_bytes > weights + row.kv_bytes
        assert row.facts.compute_bytes > 2**20
    # a smaller ubatch: logits of 32 tokens instead of 128
    assert rows["budget 0.5"].facts.n_ubatch < rows[STOCK].facts.n_ubatch
    assert rows["budget 0.5"].facts.compute_bytes < rows[STOCK].facts.compute_bytes / 2
    assert rows["budget 0.5"].facts.peak_rss_bytes < rows[STOCK].facts.peak_rss_bytes


def test_each_is_compared_with_the_faster_stock_setting(result):
    rows = {row.configuration.label: row for row in result.rows}
    for name in ("prefill", "prefill_full"):
        speeds = {label: getattr(row, name) for label, row in rows.items()}
        best = max((STOCK, STOCK_FLASH), key=lambda label: speeds[label].tokens_per_second)
        assert speeds[best].against.ratio == speeds[best].against.low == speeds[best].against.high == 1
        assert {label for label, s in speeds.items() if s.against.against != best} <= {NO_BUDGET}
        assert speeds[NO_BUDGET].against.against == STOCK, "the same kernels"


def test_baseline(result):
    assert result.baseline is not None
    assert result.baseline.identical_logits
    assert result.baseline.is_patched, "it is our own library"
    assert result.baseline.prefill.n == result.baseline.decode.n == 1
    assert result.to_dict()["baseline"]["directory"] == str(library_dir())


def test_different_logits_are_seen(smollm2, text):
    stock = Configuration(STOCK, flash_attn=False, library=library_dir())
    other = Configuration(NO_BUDGET, flash_attn=True)  # other kernels, other rounding
    with Worker(other, smollm2, SMALL_512) as worker:
        tokens = worker.tokenize(text, 512)
    compared = pairs.compare_builds(stock, other, smollm2, SMALL_512, tokens, lambda n: None)
    assert not compared.identical_logits


def test_tables(result, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_result(result)
    said = capsys.readouterr().out
    assert "which is not an unpatched build" in said
    assert "logits bit-identical" in said
    assert "carries no calibration" in said
    assert "50.0%" in said
    for row in result.rows:
        assert f"{row.decode['half'].tokens_per_second:.1f}" in said
        assert f"{row.decode['half'].against.low:.2f}-{row.decode['half'].against.high:.2f}" in said or (
            row.decode["half"].against.against == row.configuration.label
        )
    assert "…" not in said, "a column was cut"


def test_table_says_what_stands_in_for_stock(result, capsys):
    print_result(replace(result, baseline=None))
    said = capsys.readouterr().out
    assert "this library without a budget stands in for an unpatched build" in said
    assert "--baseline" in said
    assert "bit-identical" not in said
    assert result.baseline is not None
    print_result(replace(result, baseline=replace(result.baseline, is_patched=False, identical_logits=False)))
    said = capsys.readouterr().out
    assert f"unpatched build in {library_dir()}" in said.replace("\n", "")
    assert "NOT those of" in said


def test_command(smollm2):
    """The real command: one JSON object on standard output, and nothing else anywhere."""
    code = (
        "from depthkv_edge.cli.main import cli, main\n"
        "from depthkv_edge.cli.bench import bench\n"
        "cli.add_command(bench)\n"
        "main()"
    )
    arguments = ("bench", "smollm2", "-c", "512", "--repetitions", "1", "--budgets", "0.5", "--threads", "1", "--json")
    outcome: Outcome = run_python("-c", code, *arguments)
    assert outcome.err == ""
    report = outcome.json()
    assert [row["label"] for row in report["rows"]] == [STOCK, STOCK_FLASH, "budget 0.5"]
    assert [row["library"] for row in report["rows"]] == ["this"] * 3
    assert report["baseline"] == {"used": False, "directory": None, "identical_logits": None}
    assert report["command"] == "depthkv-edge " + " ".join(arguments)
    assert report["model"]["weights"] == "Q4_1"
    assert report["settings"]["n_ctx"] == 512
    assert report["settings"]["prompt_tokens"] == 480
    assert report["seconds"] > 0
    assert report["machine"]["threads"] == 1


# --- processes ----------------------------------------------------------------------------------------------------


def test_context_is_rounded_as_llama_cpp_rounds(smollm2):
    with Worker(Configuration("budget 0.5", 0.5), smollm2, SMALL) as worker:
        facts = worker.facts()
        assert facts.n_ctx == 512
        assert facts.kv_bytes == facts.kv_bytes_full // 2


def test_a_worker_that_dies(smollm2):
    with Worker(Configuration("budget 0.5", 0.5), smollm2, SMALL) as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(DepthKVError, match="^budget 0.5: its process was killed, as happens when memory runs out"):
            worker.compute([1], one_by_one=False)
    with Worker(Configuration("budget 0.5", 0.5), smollm2, SMALL) as worker:
        with pytest.raises(DepthKVError, match="^budget 0.5: its process ended .*nonsense") as error:
            worker._ask(do="nonsense")
        assert "\n" not in str(error.value)
    assert worker._process.poll() is not None


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
    settings, done = BenchSettings(8192, 2, repetitions=3), []
    schedule = make_schedule(8192, settings)
    configured = [Configuration(name) for name in "abc"]
    steps, _ = rounds._measure(configured, Path("m"), settings, schedule, range(8192), done.append)
    by_round = [asked[i : i + 3] for i in range(0, len(asked), 3)]
    assert ["".join(label for label, *_ in turn) for turn in by_round] == ["abc", "cba"] * (len(by_round) // 2)
    assert all(len({request[1:] for request in turn}) == 1 for turn in by_round), "all the same step"
    assert [turn.step for turn in steps["a"]] == [step for step in schedule.steps() if step is not None]
    assert sum(done) == 3 * rounds._cost(schedule), "the progress bar ends at 100 %"


def test_pairs_alternate(asked):
    settings, done = BenchSettings(8192, 2, repetitions=3), []
    stock, ours = Configuration("s", library=Path()), Configuration("o")
    baseline = pairs.compare_builds(stock, ours, Path("m"), settings, range(8192), done.append)
    assert baseline.prefill.n == baseline.decode.n == 6
    assert baseline.identical_logits
    order = "".join(label for label, *_ in asked)
    n = len(order) // 6
    assert order[:8] == "soossoos"
    assert order[n : 2 * n] == order[:n].translate(str.maketrans("so", "os")), "every other pair in reversed order"
    assert order == order[: 2 * n] * 3
    assert {n_tokens for *_, n_tokens, one_by_one in asked if one_by_one} == {1}
    assert sum(done) == pairs.pair_cost(settings), "the progress bar ends at 100 %"


@given(st.lists(st.lists(st.floats(0.5, 2), min_size=1, max_size=9), min_size=1, max_size=5))
def test_ratio_of_pairs(ratios):
    result = pairs.pair_ratio(ratios)
    medians = [statistics.median(pair) for pair in ratios]
    assert result.ratio == statistics.median([r for pair in ratios for r in pair])
    assert (result.low, result.high, result.n) == (min(medians), max(medians), len(ratios))
    assert (
        min(min(pair) for pair in ratios)
        <= result.interval[0]
        <= result.interval[1]
        <= max(max(pair) for pair in ratios)
    )


def test_interval_of_pairs():
    """One pair in ten that was disturbed all its life neither moves the ratio nor hides behind it."""
    calm = [[0.99, 1.0, 1.01]] * 9
    result = pairs.pair_ratio([*calm, [1.2, 1.3, 1.4]])
    assert result.ratio == 1.0
    assert result.high == 1.3
    assert 0.99 <= result.interval[0] <= 1.0 <= result.interval[1] <= 1.01
    worse = pairs.pair_ratio([[r * 0.95 for r in pair] for pair in calm])
    assert worse.interval[1] < 1


def test_a_model_with_a_budget_of_its_own(tmp_path):
    """Without a budget means without one."""
    from tiny import write_llama

    path = write_llama(tmp_path / "m.gguf", lambda writer: writer.add_float32("depthkv.budget", 0.5))
    settings = BenchSettings(n_ctx=512, n_threads=1)
    with Worker(Configuration(STOCK, flash_attn=False), path, settings) as worker:
        facts = worker.facts()
    assert facts.rule is None
    assert facts.kv_bytes == facts.kv_bytes_full
    with Worker(Configuration("budget 0.25", 0.25), path, settings) as worker:
        facts = worker.facts()
    assert facts.kv_bytes == facts.kv_bytes_full // 4


# --- numbers ------------------------------------------------------------------------------------------------------

seconds = st.floats(1e-3, 1e3)
pairs_of_seconds = st.lists(st.tuples(seconds, seconds), min_size=1, max_size=9)


@given(pairs_of_seconds, st.integers(1, 512), st.integers(1, 512))
def test_ratio(times, n_ours, n_theirs):
    ours = [Timing(n_ours, t) for t, _ in times]
    theirs = [Timing(n_theirs, t) for _, t in times]
    ratio = compare(ours, theirs, "stock")
    expected = [(n_ours / a) / (n_theirs / b) for a, b in times]
    assert ratio.ratio == pytest.approx(statistics.median(expected))
    assert (ratio.low, ratio.high) == pytest.approx((min(expected), max(expected)))
    assert (ratio.n, ratio.against) == (len(times), "stock")
    back = compare(theirs, ours, "ours")
    assert (back.low, back.high) == pytest.approx((1 / ratio.high, 1 / ratio.low))
    rates = [n_ours / t for t, _ in times]
    if len(times) % 2:
        assert speed(ours, theirs, "stock").tokens_per_second == pytest.approx(statistics.median(rates))
    assert min(rates) * 0.999 <= speed(ours, theirs, "stock").tokens_per_second <= max(rates) * 1.001


@given(pairs_of_seconds, st.floats(0, 1))
def test_evict_share(times, share):
    timings = [Timing(10, t, share * t) for t, _ in times]
    assert speed(timings, timings, "itself").evict_share == pytest.approx(share, abs=1e-9)


def test_noise_that_slows_both_down_is_not_in_the_ratio():
    machine = [1.0, 5.0, 2.0, 1.0, 3.0]
    ratio = compare([Timing(1, 2 * t) for t in machine], [Timing(1, 3 * t) for t in machine], "stock")
    assert (ratio.ratio, ratio.low, ratio.high) == (1.5, 1.5, 1.5)


def test_fastest():
    slow, fast = [Timing(10, 9), Timing(10, 9), Timing(10, 1)], [Timing(10, 8), Timing(10, 8), Timing(10, 80)]
    assert fastest({"slow": slow, "fast": fast}) == "fast", "medians, not sums or extremes"


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


@given(plans, st.integers(1, 40))
def test_plan(schedule: Schedule, repetitions):
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


@given(st.integers(512, 40_000), st.integers(1, 40))
def test_enough_repetitions(n_ctx, repetitions):
    schedule = make_schedule(n_ctx, BenchSettings(n_ctx, 1, repetitions=repetitions))
    assert repetitions <= schedule.runs * schedule.passes < 2 * repetitions
    steps = fake_turns(schedule, lambda p: 1.0, lambda p: 1.0)
    n_segments = sum(not turn.step.is_decode for turn in steps)
    for samples in (prefill_samples(steps, schedule), prefill_full_samples(steps, schedule)):
        assert len(samples) >= min(repetitions, n_segments)


def test_default_plan():
    """The sizes that the 15 minutes for 8,192 tokens rest on."""
    schedule = make_schedule(8192, BenchSettings(8192, 2))
    assert (schedule.passes, schedule.runs, schedule.run) == (1, 5, 64)
    assert schedule.depths == {"empty": 0, "quarter": 2048, "half": 4096, "full": 7872}


def fake_turns(schedule: Schedule, prefill, decode) -> list[TimedStep]:
    """Turns as if a token at position p took prefill(p) or decode(p) seconds."""
    return [
        TimedStep(
            n,
            step,
            Timing(step.n_tokens, sum((decode if step.is_decode else prefill)(p) for p in range(step.start, step.end))),
        )
        for n in range(schedule.passes)
        for step in schedule.steps()
        if step is not None
    ]


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


def test_facts(smollm2):
    machine = machine_facts(3)
    assert machine["threads"] == 3 and machine["cores"] >= 1 and machine["memory_bytes"] > 2**28
    assert machine["processor"] and machine["system"]
    engine = engine_facts()
    assert len(engine["library_sha256"]) == 64
    assert engine["llama_depthkv_version"] == capi.VERSION
    model = model_facts(smollm2)
    assert (model["architecture"], model["weights"], model["calibration"]) == ("llama", "Q4_1", None)
    assert model["bytes"] == smollm2.stat().st_size


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
    assert "tokens, too few for a context of 512" in str(outcome.exception)
    assert "--prompt" in str(outcome.exception)


def test_a_baseline_that_is_no_library(smollm2, text, tmp_path):
    (tmp_path / "libllama.so").write_bytes(b"not a library")
    (tmp_path / "libllama.dylib").write_bytes(b"not a library")
    with pytest.raises(DepthKVError, match="^stock: .*libllama"):
        bench(smollm2, SMALL_512, text, tmp_path)


@pytest.mark.parametrize("what", ["mamba", "cut"])
def test_a_model_that_cannot_be_measured(smollm2, text, tmp_path, what):
    from tiny import write_mamba

    path = tmp_path / "m.gguf"
    if what == "mamba":
        write_mamba(path)
    else:
        path.write_bytes(smollm2.read_bytes()[:-1000])
    with pytest.raises(DepthKVError) as error:
        bench(path, SMALL_512, text)
    assert ("'mamba'" if what == "mamba" else "m.gguf") in str(error.value)
    assert "\n" not in str(error.value)
