"""`inspect` says what a file holds, and the capacities that the engine really gives its layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import run_python
from support.keys import make_calibration
from support.tiny import write_llama, write_mamba

from depthkv_edge import DepthKVError
from depthkv_edge.cli.inspect import inspect as command
from depthkv_edge.cli.inspect_table import fact_rows
from depthkv_edge.modelfile.keys import Calibration
from depthkv_edge.modelfile.writer import write_calibrated
from depthkv_edge.sizing.inspection import inspect_model
from depthkv_edge.sizing.plot import plot_inspection

SENSITIVE = (7, 17, 18, 20)
CURVES = np.full((30, 3), 1e-4, np.float32) * np.array([4, 2, 1], np.float32)
CURVES[list(SENSITIVE)] *= 100


def calibration(**changes: Any) -> Calibration:
    return make_calibration(30, sensitivity=CURVES, sensitivity_se=CURVES / 10, **changes)


@pytest.fixture(scope="module")
def calibrated(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "calibrated.gguf"
    write_calibrated(smollm2, path, calibration())
    return path


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(command, [*map(str, arguments)])


def found(*arguments: object) -> dict[str, Any]:
    outcome = inspect(*arguments, "--json")
    assert outcome.exit_code == 0, outcome.exception
    return json.loads(outcome.stdout)


def refusal(*arguments: object) -> str:
    outcome = inspect(*arguments)
    assert isinstance(outcome.exception, DepthKVError) and outcome.output == "", outcome
    return str(outcome.exception)


@pytest.mark.parametrize("budget", ["0.4", "64MiB"])
def test_capacities_are_those_of_a_context(calibrated, load, budget):
    """The same cells and bytes as a model that is really loaded with that budget, and leaves no context behind."""
    kv = found(calibrated, "--kv-budget", budget, "-c", 4096)["kv"]
    expected = load(calibrated, kv_budget=budget, n_ctx=4096, n_batch=512, n_ubatch=512).kv_stats()
    assert [(layer["layer"], layer["cells"], layer["bytes"]) for layer in kv["layers"]] == [
        (layer.layer, layer.cells, layer.bytes) for layer in expected.layers
    ]
    assert (kv["bytes"], kv["bytes_full"], kv["rule"]) == (expected.bytes, expected.bytes_full, expected.rule)
    assert kv["budget"] == pytest.approx(expected.budget)
    assert kv["cells"] == sum(layer["cells"] for layer in kv["layers"]) <= kv["budget"] * kv["cells_full"] * (1 + 1e-6)
    assert kv["bytes"] == sum(layer["bytes"] for layer in kv["layers"])
    assert all(layer["chosen"] == layer["cells"] - 36 for layer in kv["layers"] if layer["cells"] < 4096)


def test_calibrated_layers(calibrated):
    """The sensitive layers get the cells, and the curves come back as they went in."""
    report = found(calibrated, "--kv-budget", "0.4")
    layers = report["kv"]["layers"]
    np.testing.assert_allclose([layer["sensitivity"] for layer in layers], CURVES)
    np.testing.assert_allclose([layer["sensitivity_se"] for layer in layers], CURVES / 10)
    least = min(layer["cells"] for layer in layers if layer["layer"] in SENSITIVE)
    most = max(layer["cells"] for layer in layers if layer["layer"] not in SENSITIVE)
    assert least > most
    assert report["n_ctx"] == 8192, "what the model was trained for"
    facts = report["calibration"]
    assert facts["keep_ratios"] == [0.2, 0.4, 0.6] and facts["layer_ids"] == list(range(30))
    assert (facts["scorer"], facts["method"], facts["gain"], facts["budget"]) == ("attention", "exact", 3.5, None)


def test_budget_of_the_file(smollm2, tmp_path):
    """Without an argument the file's own budget counts, and an argument wins over it."""
    path = tmp_path / "m.gguf"
    write_calibrated(smollm2, path, calibration(budget=0.25, rule="uniform", stability=float("nan")))
    for arguments, budget in ([], 0.25), (["--kv-budget", "0.5"], 0.5):
        report = found(path, *arguments, "-c", 4096)
        assert report["kv"]["budget"] == pytest.approx(budget)
        assert report["kv"]["cells"] <= budget * report["kv"]["cells_full"]
        assert report["kv"]["rule"] == "uniform", "calibration showed no gain"
        assert report["calibration"]["stability"] is None


def test_not_calibrated(smollm2):
    report = found(smollm2, "-c", 1024)
    assert report["calibration"] is None
    assert report["kv"]["cells"] == report["kv"]["cells_full"] == 30 * 1024
    assert report["kv"]["bytes"] == report["kv"]["bytes_full"]
    assert all(layer["sensitivity"] is None for layer in report["kv"]["layers"])
    assert all(layer["chosen"] == 1024 for layer in report["kv"]["layers"]), "nothing is evicted"
    line = next(line for line in inspect(smollm2, "-c", 1024).stdout.splitlines() if line.startswith("calibration"))
    assert "no calibration: allocation is uniform" in line and "depthkv-edge calibrate" in line


def test_table(calibrated):
    outcome = inspect(calibrated, "--kv-budget", "0.4")
    assert outcome.exit_code == 0 and outcome.stderr == ""
    assert "some/model" in outcome.stdout and "4 windows of 2048 tokens" in outcome.stdout
    assert "72.0 MiB of 180.0 MiB (40%)" in outcome.stdout
    rows = [line.split() for line in outcome.stdout.splitlines() if "±" in line]
    assert [int(row[0]) for row in rows] == list(range(30))
    assert rows[7][1:5] == ["0.04000", "±", "0.00400", "0.02333"]
    assert int(rows[7][6]) > int(rows[8][6])
    assert all(row[7] == ("-" if int(row[6]) == 8192 else str(int(row[6]) - 36)) for row in rows)
    assert rows[8][7] != "-"


def test_gemma(gemma3):
    """Sliding-window layers do not grow: they have no row, and their bytes are in the total."""
    kv = found(gemma3, "--kv-budget", "0.5", "-c", 8192)["kv"]
    assert [layer["layer"] for layer in kv["layers"]] == [5, 11, 17]
    assert sum(layer["bytes"] for layer in kv["layers"]) < kv["bytes"] < kv["bytes_full"]


def test_no_weights_are_read(calibrated):
    """A model is planned for in a fraction of the memory that it takes."""
    code = (
        "from pathlib import Path\n"
        "from depthkv_edge.engine.budget import parse_budget\n"
        "from depthkv_edge.sizing.inspection import inspect_model\n"
        "from depthkv_edge.memory import peak_rss_bytes\n"
        f"inspect_model(Path({str(calibrated)!r}), parse_budget('0.9'), 65536)\n"
        "print(peak_rss_bytes())"
    )
    outcome = run_python("-c", code)
    assert outcome.code == 0, outcome.err
    assert int(outcome.out) < 150 * 2**20  # 98 MiB of weights and 1.3 GiB of K and V are not among them


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot(calibrated, tmp_path, suffix):
    path = tmp_path / f"layers.{suffix}"
    assert found(calibrated, "--kv-budget", "0.4", "--plot", path)["calibration"]
    content = path.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    if suffix == "svg":
        for label in ("keep ratio", "budget 0.4, rule optimal", "72 of 180 MiB"):  # drawn, and named in comments
            assert label in content.decode()


@pytest.mark.parametrize("curves", [None, 0.0, 1.0])
def test_plot_of_anything(tmp_path, curves):
    """No calibration, no sensitivity at all, and as many layers as keep ratios: a picture all the same."""
    path = write_llama(tmp_path / "m.gguf")
    if curves is not None:
        flat = np.full((2, 3), curves, np.float32)
        write_calibrated(path, path, make_calibration(2, sensitivity=flat, sensitivity_se=flat))
    plot_inspection(inspect_model(path), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_plot_that_cannot_be_drawn(calibrated, tmp_path, monkeypatch):
    for target, part in ("none/p.png", "No such file"), (".", "Is a directory"), ("p.xyz", ".svg"):
        assert part in refusal(calibrated, "--plot", tmp_path / target)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'depthkv-edge[plot]'" in refusal(calibrated, "--plot", tmp_path / "p.png")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--kv-budget", "0"], "budget 0"),
        (["--kv-budget", "abc"], "'abc'"),
        (["--kv-budget", "1KiB"], "floor"),
        (["-c", "0"], "-c 0"),
        (["-c", "100000000000"], "100000000000"),
    ],
)
def test_bad_arguments(smollm2, arguments, part):
    assert part in refusal(smollm2, *arguments)


def test_bad_models(tmp_path, smollm2):
    assert "does not exist" in refusal(tmp_path / "none.gguf")
    with smollm2.open("rb") as file:
        (tmp_path / "m.gguf").write_bytes(file.read(5000))
    assert "damaged or incomplete" in refusal(tmp_path / "m.gguf")
    mamba = write_mamba(tmp_path / "mamba.gguf")
    assert "'mamba'" in refusal(mamba)
    assert "'mamba'" in refusal(mamba, "--kv-budget", "0.5")


@pytest.mark.parametrize("n_ctx", [0, 2**24 + 1, 2**31 + 5, 2**32 - 1])
def test_context_of_the_file(tmp_path, n_ctx):
    path = write_llama(tmp_path / "m.gguf", lambda writer: writer.add_uint32("llama.context_length", n_ctx))
    line = refusal(path)
    assert f"context of {n_ctx} tokens" in line and "-c" in line
    assert found(path, "-c", 512)["n_ctx"] == 512


def test_windows_that_ask_are_counted_apart(tmp_path):
    path = write_llama(tmp_path / "m.gguf")
    write_calibrated(path, path, make_calibration(2, windows=1, recall_windows=2, window_tokens=2048))
    assert "1 window and 2 that ask of 2048 tokens" in dict(fact_rows(inspect_model(path)))["calibration"]


def test_facts_that_a_file_lacks(tmp_path):
    path = write_llama(tmp_path / "m.gguf")
    nothing = {"model": "", "corpus": "", "windows": 0, "window_tokens": 0, "method": "", "tool": ""}
    write_calibrated(path, path, make_calibration(2, **nothing, gain=float("nan"), stability=float("nan")))
    facts = dict(fact_rows(inspect_model(path)))
    assert facts["calibration"] == "the file does not say how"
    assert "corpus" not in facts and "quality" not in facts
