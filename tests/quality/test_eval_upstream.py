"""Rows of stock, quantised caches against upstream's own tool on the same tokens."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from depthkv_edge.quality.language import run_window
from depthkv_edge.quality.metrics.kl import kl
from depthkv_edge.quality.metrics.top1 import top1
from depthkv_edge.quality.model import load_model
from depthkv_edge.quality.rows import build_rows

N_CTX = 512
TYPES = ("q8_0", "q4_0")


@pytest.fixture(scope="module")
def ours(smollm2: Path, text: str) -> dict[str, dict]:
    with load_model(smollm2, n_threads=2) as model:
        tokens = (model.bos + model.tokenize(text[: 8 * N_CTX]))[:N_CTX]
        rows = build_rows(model, smollm2, [f"kv-{name}" for name in TYPES], [], N_CTX, seed=0)
        return run_window(model, rows, tokens)


@pytest.fixture(scope="module")
def upstream(smollm2: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What llama-perplexity prints, by type."""
    directory = tmp_path_factory.mktemp("upstream")
    (directory / "text.txt").write_text(text[: 16 * N_CTX])  # it wants two windows to measure one
    program = Path(__file__).parents[2] / "build" / "engine" / "bin" / "llama-perplexity"
    if not program.exists():
        pytest.fail(f"{program} is not built: run scripts/setup.sh --test")
    common = [program, "-m", smollm2, "-f", directory / "text.txt", "-c", N_CTX, "-b", N_CTX, "-ub", N_CTX]
    common += ["--chunks", 1, "-t", 2, "--kl-divergence-base", directory / "base.kld"]

    def run(*more: object) -> str:
        done = subprocess.run([str(x) for x in (*common, *more)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run("-fa", "off")
    return {name: run("--kl-divergence", "-ctk", name, "-ctv", name, "-fa", "on") for name in TYPES}


@pytest.mark.parametrize("name", TYPES)
def test_quantised_rows_agree_with_llama_perplexity(ours, upstream, name):
    mean, error = map(float, re.search(r"Mean +KLD: +([\d.]+) ± +([\d.]+)", upstream[name]).groups())
    same_top = float(re.search(r"Same top p: +([\d.]+)", upstream[name])[1])
    window = {(0, 0): ours[f"kv-{name}"]}
    # the last tokens of ours are decoded one at a time, which is within upstream's own standard error
    assert kl(window, ["text"])["mean"] == pytest.approx(mean, abs=2 * error)
    assert 100 * top1(window)["share"] == pytest.approx(same_top, abs=2)
