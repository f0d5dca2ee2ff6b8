"""The command answers questions about real documents in a part of the cache."""

from __future__ import annotations

import pytest

QUESTION = "What is this text about?"


def check_schema(result: dict) -> None:
    assert list(result) == ["text", "kv", "tokens_prompt", "tokens_generated", "peak_rss_bytes", "timings"]
    assert list(result["kv"]) == ["budget", "bytes", "bytes_full", "layers"]
    assert list(result["timings"]) == ["prefill_tps", "decode_tps"]
    assert isinstance(result["text"], str)
    for layer in result["kv"]["layers"]:
        assert list(layer) == ["layer", "cells", "used", "evicted"]
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
        assert seen <= layer["used"] + layer["evicted"] <= seen + 1


def test_sixty_percent(cli, document):
    outcome = cli(
        *("run", "smollm2", "-c", 2048, "--kv-budget", "60%", "-f", "-", "-p", QUESTION, "-n", 16, "--json"),
        stdin=document(1600),
    )
    result = outcome.json()
    assert outcome.err == ""
    check_schema(result)
    check_cache(result, 0.6)
    assert all(layer["evicted"] > 0 for layer in result["kv"]["layers"])
    assert result["text"].strip()


def test_a_document_three_times_the_cells(cli, document):
    result = cli(
        *("run", "smollm2", "-c", 8192, "--kv-budget", 0.3, "-f", "-", "-p", QUESTION, "-n", 16, "--json"),
        stdin=document(7500),
    ).json()
    assert 7400 < result["tokens_prompt"] < 7700
    check_cache(result, 0.3)
    assert result["text"].strip()


def test_the_full_cache_without_a_budget(cli):
    result = cli("run", "smollm2", "-c", 512, "-p", "Say hello.", "-n", 8, "--json").json()
    check_schema(result)
    assert result["kv"]["budget"] == 1.0
    assert result["kv"]["bytes"] == result["kv"]["bytes_full"]


def test_text_and_table(cli):
    outcome = cli("run", "smollm2", "-c", 512, "-p", "Say hello.", "-n", 8, "--kv-budget", "0.5")
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip()
    rows = {line.split()[0]: line for line in outcome.err.splitlines() if line.strip()}
    assert set(rows) == {"tokens", "KV", "memory", "speed", "layers"}
    assert "(50%)" in rows["KV"]
    assert "no calibration" in rows["layers"]
    assert "prefill\x1b" not in outcome.err, "no progress bar where there is no terminal"


def test_same_text_streamed_and_in_json(cli):
    arguments = ("run", "smollm2", "-c", 512, "-p", "Name three colours, with an emoji each.", "-n", 24)
    assert cli(*arguments).out == cli(*arguments, "--json").json()["text"] + "\n"


def test_a_seed_repeats(cli):
    arguments = ("run", "smollm2", "-c", 512, "-p", "Tell me a story.", "-n", 12, "--temp", 1.5, "--json", "--seed")
    first, again, other = (cli(*arguments, seed).json()["text"] for seed in (7, 7, 8))
    assert first == again != other


def test_the_end_of_the_context_ends_the_answer(cli, document):
    result = cli("run", "smollm2", "-c", 256, "-f", "-", "-n", 500, "--json", stdin=document(200)).json()
    assert result["tokens_prompt"] + result["tokens_generated"] <= 256


@pytest.mark.parametrize("types", [("q8_0", "q8_0"), ("f16", "q4_0"), ("bf16", "f32")])
@pytest.mark.parametrize("budget", ["1.0", "0.5"])
def test_kv_types(cli, document, types, budget):
    arguments = ("--type-k", types[0], "--type-v", types[1], "--kv-budget", budget)
    result = cli("run", "smollm2", "-c", 512, "-f", "-", *arguments, "-n", 4, "--json", stdin=document(400)).json()
    assert result["tokens_generated"] == 4


@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("scorer", ["attention", "window", "streaming", "random"])
def test_scorers(cli, document, scorer, flash_attn):
    arguments = ("--scorer", scorer, "--flash-attn", flash_attn, "--kv-budget", "0.5")
    result = cli("run", "smollm2", "-c", 512, "-f", "-", *arguments, "-n", 4, "--json", stdin=document(450)).json()
    check_cache(result, 0.5)


def test_help_needs_no_model(cli):
    outcome = cli("run", "--help", DEPTHKV_LIB_PATH="/nonexistent")
    assert outcome.code == 0
    for option in ("--kv-budget", "-c", "-f", "-p", "-n", "--system", "--scorer", "--json"):
        assert option in outcome.out
