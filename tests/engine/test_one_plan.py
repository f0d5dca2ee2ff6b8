"""A budget means the same cells whichever way it comes into the engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.native_server import Server
from support.tools import run

from depthkv_edge import Llama
from depthkv_edge.engine.budget import parse_budget
from depthkv_edge.engine.context import Options, load_without_weights, open_context, plan_context
from depthkv_edge.engine.stats import read_stats
from depthkv_edge.server.launch import ServeSettings, prepare

N_CTX = 512
FULL = 30 * N_CTX * 2 * 3 * 64 * 2  # 30 layers, K and V of 3 heads of 64, F16


@pytest.mark.parametrize("budget", ["0.4", "40%", "4.5MiB", "204t"])
def test_one_plan(
    budget: str,
    cli,
    load: Callable[..., Llama],
    start: Callable[..., Server],
    smollm2: Path,
):
    asked = "smollm2", "--kv-budget", budget, "-c", N_CTX, "--json"
    with load_without_weights(smollm2) as model:
        kv = plan_context(model, Options(n_ctx=N_CTX, budget=budget)).kv
        with open_context(model, Options(n_ctx=N_CTX, budget=budget)) as context:
            assert read_stats(context).layers == kv.layers, "the C API"
    cells = [layer.cells for layer in kv.layers]
    assert 0.39 * FULL < kv.bytes <= 0.4 * FULL and kv.bytes_full == FULL

    assert [layer.cells for layer in load(n_ctx=N_CTX, kv_budget=budget).kv_stats().layers] == cells, "Python"
    for command in ("run", "-p", "Hi", "-n", 1), ("inspect",):
        layers = cli(command[0], *asked, *command[1:]).json()["kv"]["layers"]
        assert [layer["cells"] for layer in layers] == cells, command[0]

    launch = prepare(ServeSettings(smollm2, parse_budget(budget), N_CTX))
    assert launch.cache.bytes == kv.bytes and launch.cache.cells == sum(cells) // len(cells), "serve"
    told = launch.command[launch.command.index("--kv-budget") + 1]
    server = start("-m", smollm2, "-c", N_CTX, "-np", 1, "--kv-budget", told)
    assert [layer["cells"] for layer in server.slot()["kv"]["layers"]] == cells, "llama-server"
    server.close()

    once = ("-n", 0, "-r", 1, "--no-warmup", "-o", "json")
    done = run("llama-bench", "-m", smollm2, "-p", N_CTX, *once, "-v", "--kv-budget", budget)
    assert json.loads(done.stdout)[0]["kv_budget"] == budget
    said = re.search(r"llama_kv_cache_depth: size = +([\d.]+) MiB \((\d+)\.\.(\d+) of (\d+) cells", done.stderr)
    assert said is not None, done.stderr
    assert [float(said[1]), *map(int, said.groups()[1:])] == [
        round(kv.bytes / 2**20, 2), min(cells), max(cells), N_CTX
    ], "llama-bench"  # fmt: skip


def test_auto_in_the_programs(start: Callable[..., Server], smollm2: Path):
    """There is memory for all of such a small model: the full cache, which is that of stock llama.cpp."""
    kv = start("-m", smollm2, "-c", N_CTX, "-np", 1, "--kv-budget", "auto").slot()["kv"]
    assert (kv["active"], kv["budget"]) == (False, 1)
    done = run("llama-bench", "-m", smollm2, "-p", 128, "-n", 0, "-r", 1, "-o", "json", "--kv-budget", "auto,0.6")
    assert [row["kv_budget"] for row in json.loads(done.stdout)] == ["auto", "0.6"]


def test_auto_of_what_is_no_model(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    done = run("llama-bench", "-m", path, "-p", 8, "-n", 0, "--kv-budget", "auto")
    assert done.returncode == 1 and "--kv-budget auto" in done.stderr and "cannot be loaded" in done.stderr
