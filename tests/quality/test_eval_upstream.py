"""A row of a stock, quantised cache against upstream's own tool on the same tokens."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from depthkv_edge.engine.model import load_model
from depthkv_edge.quality.language import run_window
from depthkv_edge.quality.metrics.kl import kl
from depthkv_edge.quality.metrics.top1 import top1
from depthkv_edge.quality.rows import build_rows

N_CTX = 512


@pytest.fixture(scope="module")
def upstream(smollm2: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What llama-perplexity prints."""
    directory = tmp_path_factory.mktemp("upstream")
    (directory / "text.txt").write_text(text[: 16 * N_CTX])  # it wants two windows to measure one
    program = Path(__file__).parents[2] / "build" / "engine" / "bin" / "llama-perplexity"
    if not program.exists():
        pytest.fail(f"{program} is not built: run scripts/setup.sh --test")
    common = [program, "-m", smollm2, "-f", directory / "text.txt", "-c", N_CTX, "-b", N_CTX, "-ub", N_CTX]
    common += ["--chunks", 1, "-t", 2, "--kl-divergence-base", directory / "base.kld"]
    for more in ["-fa", "off"], ["--kl-divergence", "-ctk", "q4_0", "-ctv", "q4_0", "-fa", "on"]:
        done = subprocess.run([str(x) for x in (*common, *more)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_quantised_row_agrees_with_llama_perplexity(smollm2, text, upstream):
    with load_model(smollm2, n_threads=2) as model:
        tokens = (model.bos + model.tokenize(text[: 8 * N_CTX]))[:N_CTX]
        full, _, row = build_rows(model, smollm2, ["kv-q4_0"], [], N_CTX, seed=0)
        window = {(0, 0): run_window(model, [full, row], tokens)["kv-q4_0"]}
    mean, error = map(float, re.search(r"Mean +KLD: +([\d.]+) ± +([\d.]+)", upstream).groups())
    same_top = float(re.search(r"Same top p: +([\d.]+)", upstream)[1])
    # the last tokens of ours are decoded one at a time, which is within upstream's own standard error
    assert kl(window, ["text"])["mean"] == pytest.approx(mean, abs=2 * error)
    assert 100 * top1(window)["share"] == pytest.approx(same_top, abs=2)
