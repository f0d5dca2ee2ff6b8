"""llama.cpp's other tools from the patched tree: the same flag everywhere, and what it refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from support.tools import run

# threads that spin must not share a core
THREADS = min(2, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 2


@pytest.fixture(scope="module")
def document_file(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text[:6000], encoding="utf-8")
    return path


@pytest.mark.parametrize("tool", ["llama-server", "llama-cli", "llama-perplexity", "llama-bench"])
def test_the_flag(smollm2: Path, tool: str):
    assert "--kv-budget" in run(tool, "--help").stdout
    done = run(tool, "-m", smollm2, "--kv-budget", "1.5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --kv-budget: KV budget 1.5 is above the full cache: give a fraction in ")
    assert done.stderr.count("\n") == 1


def test_a_bad_value_in_the_environment(smollm2: Path):
    done = run("llama-cli", "-m", smollm2, LLAMA_ARG_KV_BUDGET="2")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "KV budget 2 is above the full cache" in done.stderr


def test_perplexity_refuses_shared_cells(smollm2: Path, document_file: Path):
    for flag in ("--hellaswag", "--winogrande", "--multiple-choice"):
        done = run("llama-perplexity", "-m", smollm2, "-f", document_file, "--kv-budget", "0.5", flag)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: --kv-budget does not go with {flag}: ")


def perplexity(smollm2: Path, document_file: Path, *arguments: Any) -> tuple[float, str]:
    done = run(
        "llama-perplexity", "-m", smollm2, "-f", document_file, "-c", 512, "--chunks", 1, "-t", THREADS, "--no-warmup",
        "-lv", 4, *arguments,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-2000:]
    (estimate,) = re.findall(r"Final estimate: PPL = ([0-9.]+)", output)
    return float(estimate), output


def test_perplexity(smollm2: Path, document_file: Path):
    full, output = perplexity(smollm2, document_file, "--kv-budget", 1)
    assert "llama_kv_cache_depth" not in output
    half, output = perplexity(smollm2, document_file, "--kv-budget", 0.5)  # with --fit, which is on
    assert "256..256 of 512 cells" in output
    by_key, _ = perplexity(smollm2, document_file, "--override-kv", "depthkv.budget=float:0.5")
    assert half == by_key != full
    assert half < 1.5 * full


def test_parallel_sequences(smollm2: Path, document_file: Path):
    """The flag wins over the key."""
    flags = ("-b", 1024, "--chunks", 2, "--override-kv", "depthkv.budget=float:0.75", "--kv-budget", 0.5)
    estimate, output = perplexity(smollm2, document_file, *flags)
    assert "256..256 of 512 cells" in output and "2 seqs" in output
    assert 1 < estimate < 100


def test_cli(smollm2: Path, text: str):
    done = run(
        "llama-cli", "-m", smollm2, "-c", 512, "-t", THREADS, "--kv-budget", 0.4, "-st", "-n", 16, "--temp", 0,
        "-p", text[:1400] + " What is this?", "-sys", "You are a librarian.", "--simple-io", "-lv", 4,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-2000:]
    assert "192..224 of 512 cells" in output


def bench(smollm2: Path, *arguments: Any) -> list[dict[str, Any]]:
    done = run("llama-bench", "-m", smollm2, "-t", THREADS, "-r", 1, "--no-warmup", "-o", "json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_bench(smollm2: Path):
    results = bench(smollm2, "-p", 128, "-n", 4, "-d", 256, "--kv-budget", "0.5,1")
    assert [(r["kv_budget"], r["n_prompt"], r["n_gen"]) for r in results] == [
        ("0.5", 128, 0), ("0.5", 0, 4), ("1", 128, 0), ("1", 0, 4)
    ]  # fmt: skip
    assert all(r["avg_ts"] > 0 for r in results)
    assert [r["kv_budget"] for r in bench(smollm2, "-p", 8, "-n", 0)] == [""]  # what the model asks for


def test_bench_says_why_not(smollm2: Path):
    done = run("llama-bench", "-m", smollm2, "-p", 64, "-n", 0, "--kv-budget", "0.05")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "is below the floor" in done.stderr
