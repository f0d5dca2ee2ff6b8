"""Models with the attention of real ones: none aborts, every one works, and docs/support.md says so."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.zoo.check import check_shape, refused
from benchmarks.zoo.page import PAGE, TOP, refusals, row
from benchmarks.zoo.shapes import SHAPES, Shape
from benchmarks.zoo.write import write_model
from depthkv_edge.engine.model import Cache, decode, load_model, open_context
from depthkv_edge.engine.stats import read_stats

BIN = Path(os.environ.get("DEPTHKV_TEST_PROGRAMS", Path(__file__).parents[2] / "build" / "engine" / "bin"))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name.replace(" ", "-"))
def test_shape(shape, tmp_path):
    check = check_shape(shape, tmp_path)
    assert not check.failed
    assert len(check.created) == len(check.ran) == 7
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    assert row(check) in lines, "run .venv/bin/python -m benchmarks.zoo"


HEADS = Shape("heads", "deci", 4, 64, 8, (2, 0, 8, 1), 64, 4096)


def test_layers_with_heads_of_their_own(tmp_path):
    """A layer without KV heads has no cells."""
    check = check_shape(HEADS, tmp_path)
    assert not check.failed
    assert check.n_layers_budget == 3
    assert len(check.created) == len(check.ran) == 7


def test_buffers_are_there_from_the_start(tmp_path):
    """The layer with the most cells is not the one with the most heads."""
    path = write_model(tmp_path / "heads.gguf", HEADS, n_layers=4)
    with load_model(path, 1) as model, open_context(model, 512, Cache(cells=(448, 96, 96))) as context:
        before = read_stats(context)
        for at in range(0, 512, 64):
            decode(context, [i % 100 for i in range(64)], at)
        after = read_stats(context)
    assert after.n_score > 0 and all(layer.evicted > 0 for layer in after.layers)
    assert after.bytes_scorer == before.bytes_scorer


def test_operations_of_gpu_backends(tmp_path):
    """Nothing that Metal, CUDA or Vulkan would leave to the CPU, where they compute all of it with the stock cache."""
    by_heads = {(shape.head, shape.head_swa, shape.n_heads == shape.n_heads_kv): shape for shape in SHAPES}
    for shape in by_heads.values():
        write_model(tmp_path / f"{shape.name}.gguf", shape, n_layers=shape.n_layers_run)
    done = subprocess.run([BIN / "test-depth-ops", tmp_path], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "OK: " in done.stdout


def test_the_rest_of_the_page(tmp_path):
    page = PAGE.read_text()
    assert page.startswith(TOP) and page.endswith(refusals(refused(tmp_path))), "run .venv/bin/python -m benchmarks.zoo"
