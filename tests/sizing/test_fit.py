"""What a context needs in bytes, what is chosen for a memory size, and that it holds in a process."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result
from conftest import Outcome, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import write_llama, write_mamba

from depthkv_edge import DepthKVError
from depthkv_edge.cli.main import cli as command
from depthkv_edge.engine import capi
from depthkv_edge.engine.budget import parse_budget, parse_size
from depthkv_edge.engine.context import Options
from depthkv_edge.sizing import fit
from depthkv_edge.sizing.fit import contexts_up_to, fit_memory, free_memory, measuring

MIB = 2**20
LOWEST_BUDGET = 0.2  # LLAMA_DEPTHKV_AUTO_MIN
AUTO = parse_budget("auto")


def test_sizes():
    for written, n_bytes in ("512MiB", 512 * MIB), (" 1.5 gib ", 1536 * MIB), ("2GB", 2 * 10**9), ("800kb", 800_000):
        assert parse_size(written) == n_bytes


@pytest.mark.parametrize("written", ["", "512", "60%", "4096t", "auto", "many", "0MiB", "-1MiB", "nanMiB"])
def test_no_size(written):
    with pytest.raises(DepthKVError, match="512MiB") as caught:
        parse_size(written)
    assert "\n" not in str(caught.value)


def test_contexts():
    assert contexts_up_to(8192) == [8192, 4096, 2048, 1024, 512]
    assert contexts_up_to(3000) == [3000, 2048, 1024, 512]
    assert contexts_up_to(40) == [40]


# the choice: what the engine chooses for one context is in native/tests/test-depth-plan.cpp


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("tiny") / "m.gguf")  # trained for 512 tokens


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("tiny") / "long.gguf", n_ctx=8192, n_layers=12)


@settings(deadline=None, max_examples=10)
@given(share=st.floats(0, 1))
def test_the_largest_context_that_fits(long, share):
    with measuring(long, process_bytes=0) as need_of:
        least = {n: need_of(n, LOWEST_BUDGET, 32).total for n in (512, 1024, 2048, 4096, 8192)}
        most = need_of(8192, 1.0, 512).total
    memory = int(least[512] - MIB + share * (most - least[512] + 2 * MIB))
    try:
        found = fit_memory(long, memory, process_bytes=0)
    except DepthKVError as error:
        assert "too little memory" in str(error) and memory < least[512]
        return
    assert found.n_ctx == max(n for n, needed in least.items() if needed <= memory)
    assert found.need.total <= memory
    said = dict(found.rows)["context"]
    assert said.endswith("was trained for" if found.n_ctx == 8192 else f"that fits: {2 * found.n_ctx} would not")


@pytest.mark.parametrize("share", ["0.3", "3000t", "1"])
def test_a_given_budget_is_kept(long, share):
    found = fit_memory(long, 2**40, 8192, parse_budget(share))
    assert found.kv_budget == share and dict(found.rows)["budget"].endswith("as given")
    tight = fit_memory(long, found.need.total - 1, 8192, parse_budget(share), process_bytes=found.need.process)
    assert tight.kv_budget == share and tight.n_ubatch < found.n_ubatch and tight.need.total < found.need.total


def test_the_least_memory_is_named(tiny):
    with pytest.raises(DepthKVError) as caught:
        fit_memory(tiny, MIB, 512)
    text = str(caught.value)
    assert "m.gguf" in text and "512 tokens" in text and "\n" not in text
    least = parse_size(text.partition("would do is ")[2].partition(",")[0])
    assert fit_memory(tiny, least + 4 * MIB, 512).budget >= LOWEST_BUDGET, "this process has grown meanwhile"
    with pytest.raises(DepthKVError):
        fit_memory(tiny, least - 4 * MIB, 512)


def test_sizes_in_bytes_and_tokens(tiny):
    assert fit_memory(tiny, 2**40, 512, parse_budget("256t")).budget == 0.5
    assert fit_memory(tiny, 2**40, 512, parse_budget("128KiB")).budget == 0.5
    assert fit_memory(tiny, 2**40, 512, AUTO).budget == 1.0


def test_the_budget_of_the_file_is_kept(tmp_path):
    path = write_llama(tmp_path / "m.gguf", lambda writer: writer.add_float32("depthkv.budget", 0.5))
    found = fit_memory(path, 2**40, 512)
    assert found.budget == 0.5 and dict(found.rows)["budget"].endswith("as the model file says")
    assert fit_memory(path, 2**40, 512, AUTO).budget == 1.0, "unless another is asked for"


def test_what_cannot_be_planned(tiny, tmp_path):
    for n_ctx, why in (2**23, "is too little memory"), (2**30, "longer than"):
        with pytest.raises(DepthKVError, match=why) as caught:
            fit_memory(tiny, 64 * MIB, n_ctx)
        assert str(n_ctx) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DepthKVError, match="'mamba'"):
        fit_memory(write_mamba(tmp_path / "mamba.gguf"), 2**40, 512, parse_budget("0.5"))


def test_free_memory_counts_what_the_process_has(monkeypatch):
    monkeypatch.setattr(fit.capi, "llama_depthkv_memory_free", lambda: 900 * MIB)
    monkeypatch.setattr(fit, "rss_bytes", lambda: 100 * MIB)
    assert free_memory() == 1000 * MIB


def test_free_memory_is_what_the_system_says():
    available = psutil.virtual_memory().available
    assert 0 < capi.llama_depthkv_memory_free() <= available
    assert capi.llama_depthkv_memory_free() > 0.5 * available or Path("/sys/fs/cgroup/memory.max").exists()


# the engine


def test_what_is_planned_is_what_is_allocated(load, smollm2):
    options = Options(type_k=8, type_v=8)
    with measuring(smollm2) as need_of, measuring(smollm2, options) as need_of_q8:
        cases = {(b, q): (need_of_q8 if q else need_of)(1024, b, 64) for b in (1.0, 0.5) for q in (False, True)}
    for (budget, quantised), need in cases.items():
        types = {"type_k": 8, "type_v": 8} if quantised else {}
        llama = load(n_ctx=1024, n_batch=512, kv_budget=budget, **types)
        stats = llama.kv_stats()
        assert need.kv == stats.bytes
        # the engine reserves logits for every token of the ubatch, of which the last one's are used
        reserved = stats.bytes_compute + stats.bytes_work
        assert 0 < need.compute <= reserved <= need.compute + 4 * stats.n_ubatch * llama.n_vocab()
        assert stats.bytes_work > 0 or quantised
        if budget < 1:
            llama.eval(llama.tokenize(b"Rivers and bridges. " * 120)[:600])
            assert llama.kv_stats().n_score > 0
            grown = llama.kv_stats().bytes_scorer
            assert grown <= need.scorer <= 2 * grown + MIB, "the most that scoring and shifting can take"
        llama.close()


def test_a_process_stays_under_the_memory(cli, document):
    arguments = ("run", "smollm2", "-c", 4096, "-f", "-", "-p", "What is this?", "-n", 8, "--threads", 2, "--json")
    outcome = cli(*arguments, "--memory", "256MiB", stdin=document(1500))
    result = outcome.json()
    assert result["peak_rss_bytes"] <= 256 * MIB
    assert result["tokens_prompt"] > 1400
    rows = {line.split()[0]: line for line in outcome.err.splitlines()}
    assert "4096 tokens, as given" in rows["context"] and "the largest that fits" in rows["budget"]
    said = float(rows["memory"].split()[1])
    assert 0.75 * said <= result["peak_rss_bytes"] / MIB <= said <= 256, "and what was said is what it takes"


REPACKED = """
import sys
from pathlib import Path
from depthkv_edge import Llama
from depthkv_edge.cli.options import fitted
from depthkv_edge.sizing.fit import fit_memory
from depthkv_edge.memory import peak_rss_bytes
path = Path(sys.argv[1])
memory = fit_memory(path, 2**40, 512).need.total + 4 * 2**20
llama = Llama(path, **fitted(path, memory, None, 512, 512, 1, 1).arguments(), verbose=False)
llama.eval([1] * 500)
print(memory, peak_rss_bytes())
"""


def test_weights_that_are_repacked_count_once(tmp_path):
    """Q4_0: the CPU backend copies them in another order, and a mapped file would stay beside the copy."""
    path = write_llama(tmp_path / "m.gguf", n_layers=4, n_ff_q4_0=2**16)
    assert path.stat().st_size > 25 * MIB
    outcome = run_python("-c", REPACKED, str(path))
    assert outcome.code == 0, outcome.err
    memory, peak = map(int, outcome.out.split())
    assert peak <= memory


def test_auto_from_python(load, smollm2, monkeypatch):
    """What the command line chooses, and refuses."""
    plenty = load(n_ctx=2048, kv_budget="auto")
    assert plenty.kv_stats().budget == 1.0
    plenty.close()
    with measuring(smollm2, Options(n_batch=64)) as need_of:
        half = need_of(2048, 0.5, 64).total
    monkeypatch.setattr(fit, "free_memory", lambda: half)
    some = load(n_ctx=2048, kv_budget="auto").kv_stats()
    assert some.active and LOWEST_BUDGET <= some.budget <= 0.6
    monkeypatch.setattr(fit, "free_memory", lambda: 64 * MIB)
    with pytest.raises(DepthKVError, match="too little memory"):
        load(n_ctx=2048, kv_budget="auto")


def invoke(*arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(command, [*map(str, arguments), "-n", "1", "--json"], input=stdin)


def test_the_context_is_chosen():
    """There is plenty: this process has grown."""
    outcome = invoke("run", "smollm2", "-p", "Hi", "--memory", "1000GiB")
    assert outcome.exit_code == 0, outcome.exception
    assert "8192 tokens, what the model was trained for" in outcome.stderr
    assert json.loads(outcome.stdout)["kv"]["budget"] == 1.0
    outcome = invoke("run", "smollm2", "-p", "Hi", "--kv-budget", "auto", "-c", 512)
    assert "512 tokens, as given" in outcome.stderr and "the full cache fits" in outcome.stderr
    outcome = invoke("chat", "smollm2", "--memory", "1000GiB", "--kv-budget", 0.5, "-c", 512, stdin="Hi\n")
    assert "0.5 of the full KV cache, as given" in outcome.stderr
    assert json.loads(outcome.stdout)["kv"]["budget"] == 0.5


def test_what_cannot_fit_fails_before_loading():
    for arguments in ("-c", 8192), ("-c", 8192, "--kv-budget", "0.5"), ():
        outcome = invoke("run", "smollm2", "-p", "Hi", *arguments, "--memory", "50MiB")
        assert isinstance(outcome.exception, DepthKVError) and outcome.output == "", outcome
        assert "50.0 MiB is too little memory" in str(outcome.exception)


# a hard limit

LIMITED = """
import json, resource, sys
from pathlib import Path
limit, *arguments = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
from depthkv_edge.cli.main import main
sys.argv[1:] = arguments
try:
    main()
finally:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmPeak"))
    print(int(line.split()[1]) * 1024, file=sys.stderr)
"""


def limited(limit: int, *arguments: object, stdin: str = "") -> tuple[Outcome, int]:
    """Run the command in a limited address space; also the most that it has had of it."""
    # one arena: each further one reserves 64 MiB of addresses that it does not use
    outcome = run_python("-c", LIMITED, str(limit), *map(str, arguments), stdin=stdin, MALLOC_ARENA_MAX="1")
    *lines, peak = outcome.err.splitlines()
    return Outcome(outcome.code, outcome.out, "\n".join(lines)), int(peak)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="address space is limited and measured on Linux")
def test_a_budget_completes_where_the_full_cache_fails(document):
    """The same context and the same document: 8,192 positions, and more tokens than a budget of 0.3 has cells."""
    asked = ("run", "smollm2", "-c", 8192, "-n", 4, "--threads", 2, "--json", "-p")
    depth = ("--kv-budget", 0.3)
    (stock_hi, peak_stock), (depth_hi, peak_depth) = limited(0, *asked, "Hi"), limited(0, *asked, "Hi", *depth)
    assert stock_hi.json()["kv"]["budget"] == 1.0 and depth_hi.json()["kv"]["budget"] == pytest.approx(0.3)
    assert peak_stock - peak_depth > 128 * MIB, "otherwise no limit tells the two apart"

    limit, text = (peak_depth + peak_stock) // 2, document(2600)
    outcome, _ = limited(limit, *asked, "What is this about?", "-f", "-", stdin=text)
    assert outcome.code == 2 and outcome.out == "", outcome
    assert len(outcome.err.splitlines()) == 1 and "depthkv-edge: " in outcome.err

    outcome, peak = limited(limit, *asked, "What is this about?", "-f", "-", *depth, stdin=text)
    result = outcome.json()
    assert result["text"].strip() and result["tokens_prompt"] > 2500
    assert all(layer["evicted"] > 0 for layer in result["kv"]["layers"])
    assert peak <= limit
