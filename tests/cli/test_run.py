"""The command answers questions about real documents in a part of the cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from conftest import Outcome
from support.outcome import refused, run_here

QUESTION = "What is this text about?"


@pytest.fixture
def run(capfd, smollm2) -> Callable[..., Outcome]:
    return partial(run_here, capfd, "run")


def check_schema(result: dict) -> None:
    assert list(result) == ["text", "kv", "tokens_prompt", "tokens_generated", "peak_rss_bytes", "timings"]
    assert list(result["kv"]) == ["budget", "bytes", "bytes_full", "layers"]
    assert list(result["timings"]) == ["prefill_tps", "decode_tps"]
    assert isinstance(result["text"], str)
    for layer in result["kv"]["layers"]:
        assert list(layer) == ["layer", "cells", "used", "evicted", "sinks", "pinned", "recent", "chosen"]
        assert layer["used"] == layer["sinks"] + layer["pinned"] + layer["recent"] + layer["chosen"]
        assert all(type(value) is int and value >= 0 for value in layer.values())
    for name in ("tokens_prompt", "tokens_generated", "peak_rss_bytes"):
        assert type(result[name]) is int and result[name] > 0
    assert all(rate > 0 for rate in result["timings"].values())


def check_cache(result: dict, budget: float) -> None:
    kv = result["kv"]
    assert kv["budget"] == pytest.approx(budget)
    assert kv["bytes"] <= budget * kv["bytes_full"]
    assert [layer["layer"] for layer in kv["layers"]] == list(range(30))
    # the last token generated is never computed
    seen = result["tokens_prompt"] + result["tokens_generated"] - 1
    for layer in kv["layers"]:
        assert 0 < layer["used"] <= layer["cells"]
        assert layer["evicted"] > 0
        assert seen <= layer["used"] + layer["evicted"] <= seen + 1


def test_a_document_three_times_the_cells(run, document):
    asked = ("-c", 2048, "--kv-budget", "30%", "-f", "-", "-p", QUESTION, "-n", 16, "--json")
    outcome = run("smollm2", *asked, stdin=document(1850))
    result = outcome.json()
    assert outcome.err == ""
    check_schema(result)
    check_cache(result, 0.3)
    assert result["tokens_prompt"] > 3 * 0.3 * 2048
    assert result["text"].strip()


def test_the_end_of_the_context_ends_the_answer(run, document):
    """In the full cache, without a budget."""
    result = run("smollm2", "-c", 256, "-f", "-", "-n", 500, "--json", stdin=document(200)).json()
    check_schema(result)
    assert result["kv"]["budget"] == 1.0
    assert result["kv"]["bytes"] == result["kv"]["bytes_full"]
    assert result["tokens_prompt"] + result["tokens_generated"] <= 256


def test_text_and_table(run):
    asked = ("smollm2", "-c", 512, "-p", "Name three colours, with an emoji each.", "-n", 24, "--kv-budget", "0.5")
    outcome = run(*asked)
    assert outcome.code == 0, outcome.err
    assert outcome.out == run(*asked, "--json").json()["text"] + "\n"
    rows = {line.split()[0]: line for line in outcome.err.splitlines() if line.strip()}
    assert set(rows) == {"tokens", "KV", "memory", "speed", "layers"}
    assert "(50%)" in rows["KV"]
    assert "the model file carries no calibration" in rows["layers"]
    assert "prefill\x1b" not in outcome.err, "no progress bar where there is no terminal"


def test_how_layers_are_sized(run, calibrated):
    asked = ("-p", "Name a colour.", "-n", 2, "-c", 2048, "--kv-budget", 0.5)
    for arguments, says in {
        (): "by calibrated sensitivity (optimal)",
        ("--rule", "uniform"): "all the same size: the allocation rule is uniform",
        ("--scorer", "streaming"): "calibrated with scorer attention, not streaming",
    }.items():
        assert says in " ".join(run(calibrated, *asked, *arguments).err.split())
    assert "calibrate the model or use uniform" in refused(run("smollm2", *asked, "--rule", "optimal"))


def test_a_seed_repeats(run):
    asked = ("smollm2", "-c", 512, "-p", "Tell me a story.", "-n", 12, "--temp", 1.5, "--json", "--seed")
    first, again, other = (run(*asked, seed).json()["text"] for seed in (7, 7, 8))
    assert first == again != other


@pytest.mark.parametrize(
    ("type_k", "type_v", "flash_attn"), [("q8_0", "q8_0", "on"), ("f16", "q4_0", "auto"), ("bf16", "f32", "off")]
)
def test_kv_types(run, document, type_k, type_v, flash_attn):
    sizes = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}  # bytes of a number
    types = ("--type-k", type_k, "--type-v", type_v, "--flash-attn", flash_attn, "--kv-budget", 0.5)
    result = run("smollm2", "-c", 512, "-f", "-", *types, "-n", 4, "--json", stdin=document(300)).json()
    check_cache(result, 0.5)
    assert result["kv"]["bytes_full"] == 30 * 512 * 3 * 64 * (sizes[type_k] + sizes[type_v])
