"""`inspect` says what a file holds, and the capacities that the engine really gives its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_python
from support.keys import HOSTILE, hostile, make_calibration
from support.outcome import refused
from support.tiny import write_llama, write_mamba

from depthkv_edge import Llama
from depthkv_edge.cli.inspect_table import fact_rows
from depthkv_edge.modelfile.keys import Calibration
from depthkv_edge.modelfile.writer import write_calibrated
from depthkv_edge.sizing.inspection import inspect_model

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


@pytest.mark.parametrize("budget", ["0.4", "60%", "64MiB", "2000t"])
def test_capacities_are_those_of_a_context(cli, calibrated, load, budget):
    """The same cells and bytes as a model that is really loaded with that budget."""
    kv = cli("inspect", calibrated, "--kv-budget", budget, "-c", 4096, "--json").json()["kv"]
    expected = load(calibrated, kv_budget=budget, n_ctx=4096, n_batch=512, n_ubatch=512).kv_stats()
    assert [(layer["layer"], layer["cells"], layer["bytes"]) for layer in kv["layers"]] == [
        (layer.layer, layer.cells, layer.bytes) for layer in expected.layers
    ]
    assert (kv["bytes"], kv["bytes_full"], kv["rule"]) == (expected.bytes, expected.bytes_full, expected.rule)
    assert kv["budget"] == pytest.approx(expected.budget)
    assert kv["cells"] == sum(layer["cells"] for layer in kv["layers"]) <= kv["budget"] * kv["cells_full"] * (1 + 1e-6)
    assert kv["bytes"] == sum(layer["bytes"] for layer in kv["layers"])


def test_calibrated_layers(cli, calibrated):
    """The sensitive layers get the cells, and the curves come back as they went in."""
    found = cli("inspect", calibrated, "--kv-budget", "0.4", "--json").json()
    layers = found["kv"]["layers"]
    np.testing.assert_allclose([layer["sensitivity"] for layer in layers], CURVES)
    np.testing.assert_allclose([layer["sensitivity_se"] for layer in layers], CURVES / 10)
    least = min(layer["cells"] for layer in layers if layer["layer"] in SENSITIVE)
    most = max(layer["cells"] for layer in layers if layer["layer"] not in SENSITIVE)
    assert least > most
    assert all(layer["keep_ratio"] == layer["cells"] / found["n_ctx"] for layer in layers)
    assert found["n_ctx"] == 8192, "what the model was trained for"
    facts = found["calibration"]
    assert facts["keep_ratios"] == [0.2, 0.4, 0.6] and facts["layer_ids"] == list(range(30))
    assert (facts["scorer"], facts["method"], facts["gain"], facts["budget"]) == ("attention", "exact", 3.5, None)


@pytest.mark.parametrize("given", [None, "0.5"])
def test_budget_of_the_file(cli, smollm2, tmp_path, given):
    """Without an argument the file's own budget counts, and an argument wins over it."""
    path = tmp_path / "m.gguf"
    write_calibrated(smollm2, path, calibration(budget=0.25, rule="uniform", stability=float("nan")))
    arguments = ["--kv-budget", given] if given else []
    found = cli("inspect", path, *arguments, "-c", 4096, "--json").json()
    assert found["kv"]["budget"] == pytest.approx(float(given or 0.25))
    assert found["kv"]["cells"] <= float(given or 0.25) * found["kv"]["cells_full"]
    assert found["kv"]["rule"] == "uniform", "calibration showed no gain"
    assert found["calibration"]["stability"] is None


def test_not_calibrated(cli, smollm2):
    found = cli("inspect", "smollm2", "-c", 1024, "--json").json()
    assert found["calibration"] is None
    assert found["kv"]["cells"] == found["kv"]["cells_full"] == 30 * 1024
    assert found["kv"]["bytes"] == found["kv"]["bytes_full"]
    assert all(layer["sensitivity"] is None for layer in found["kv"]["layers"])
    text = cli("inspect", "smollm2", "-c", 1024)
    assert text.code == 0 and text.err == ""
    line = next(line for line in text.out.splitlines() if line.startswith("calibration"))
    assert "no calibration: allocation is uniform" in line and "depthkv-edge calibrate" in line


def test_table(cli, calibrated):
    outcome = cli("inspect", calibrated, "--kv-budget", "0.4")
    assert outcome.code == 0 and outcome.err == ""
    assert "some/model" in outcome.out and "4 windows of 2048 tokens" in outcome.out
    assert "72.0 MiB of 180.0 MiB (40%)" in outcome.out
    rows = [line.split() for line in outcome.out.splitlines() if "±" in line]
    assert [int(row[0]) for row in rows] == list(range(30))
    assert rows[7][1:5] == ["0.04000", "±", "0.00400", "0.02333"]
    assert int(rows[7][6]) > int(rows[8][6])


def test_gemma(cli, gemma3):
    """Sliding-window layers do not grow: they have no row, and their bytes are in the total."""
    found = cli("inspect", gemma3, "--kv-budget", "0.5", "-c", 8192, "--json").json()["kv"]
    assert [layer["layer"] for layer in found["layers"]] == [5, 11, 17]
    assert sum(layer["bytes"] for layer in found["layers"]) < found["bytes"] < found["bytes_full"]


def test_no_weights_are_read(calibrated, monkeypatch):
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


def test_leaves_no_context_behind(calibrated, load):
    """An inspection in a process that goes on to run the model."""
    assert inspect_model(calibrated, None, 512).kv.active is False
    llama: Llama = load(calibrated, n_threads=1, n_threads_batch=1)
    llama.eval([1, 2, 3])
    assert llama.n_tokens == 3


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot(cli, calibrated, tmp_path, suffix):
    path = tmp_path / f"layers.{suffix}"
    assert cli("inspect", calibrated, "--kv-budget", "0.4", "--plot", path, "--json").json()["calibration"]
    content = path.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    if suffix == "png":
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        assert (width, height) == (1200, 500)
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
    from depthkv_edge.sizing.plot import plot_inspection

    plot_inspection(inspect_model(path), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_plot_without_matplotlib(calibrated, tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        f"sys.argv = ['depthkv-edge', 'inspect', {str(calibrated)!r}, '--plot', {str(tmp_path / 'p.png')!r}]\n"
        "from depthkv_edge.cli.main import main; main()"
    )
    assert "pip install 'depthkv-edge[plot]'" in refused(run_python("-c", code))


@pytest.mark.parametrize(
    ("target", "part"), [("none/p.png", "No such file"), (".", "Is a directory"), ("p.xyz", ".svg")]
)
def test_plot_target(cli, calibrated, tmp_path, target, part):
    assert part in refused(cli("inspect", calibrated, "--plot", tmp_path / target))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--kv-budget", "0"], "budget 0"),
        (["--kv-budget", "abc"], "'abc'"),
        (["--kv-budget", "1KiB"], "floor"),
        (["-c", "0"], "-c 0"),
        (["-c", "100000000000"], "100000000000"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_arguments(cli, smollm2, arguments, part):
    assert part in refused(cli("inspect", "smollm2", *arguments))


def test_bad_models(cli, tmp_path, smollm2):
    assert "does not exist" in refused(cli("inspect", tmp_path / "none.gguf"))
    (tmp_path / "m.gguf").write_bytes(smollm2.read_bytes()[:5000])
    assert "damaged or incomplete" in refused(cli("inspect", tmp_path / "m.gguf"))
    mamba = write_mamba(tmp_path / "mamba.gguf")
    assert "'mamba'" in refused(cli("inspect", mamba))
    assert "'mamba'" in refused(cli("inspect", mamba, "--kv-budget", "0.5"))


def test_corrupt_keys(cli, tmp_path):
    key, _, part = HOSTILE["curves short"]

    def add(writer: Any) -> None:
        for entry in hostile("curves short"):
            writer.add_key_value(entry.name, entry.value, entry.type, entry.item_type)

    line = refused(cli("inspect", write_llama(tmp_path / "m.gguf", add, n_layers=4)))
    assert f"depthkv.{key}" in line and part in line


@pytest.mark.parametrize("n_ctx", [0, 2**24 + 1, 2**31 + 5, 2**32 - 1])
def test_context_of_the_file(cli, tmp_path, n_ctx):
    path = write_llama(tmp_path / "m.gguf", lambda writer: writer.add_uint32("llama.context_length", n_ctx))
    line = refused(cli("inspect", path))
    assert f"context of {n_ctx} tokens" in line and "-c" in line
    assert cli("inspect", path, "-c", 512, "--json").json()["n_ctx"] == 512


def test_facts_that_a_file_lacks(tmp_path):
    path = write_llama(tmp_path / "m.gguf")

    def rows(**changes: Any) -> dict[str, str]:
        write_calibrated(path, path, make_calibration(2, **changes))
        return dict(fact_rows(inspect_model(path)))

    found = rows()
    assert found["calibration"] == "exact on some/model, 4 windows of 2048 tokens, by depthkv-edge 0"
    assert "3.5 times lower than uniform at a budget of 0.4" in found["quality"]
    nothing = {"model": "", "corpus": "", "windows": 0, "window_tokens": 0, "method": "", "tool": ""}
    found = rows(**nothing, gain=float("nan"), stability=float("nan"))
    assert found["calibration"] == "the file does not say how"
    assert "corpus" not in found and "quality" not in found
    assert rows(**nothing | {"windows": 1})["calibration"] == "1 window"


@pytest.mark.parametrize("budget", [2.0, "abc", "0.5"])
def test_corrupt_budget(cli, tmp_path, budget):
    def add(writer: Any) -> None:
        (writer.add_string if isinstance(budget, str) else writer.add_float32)("depthkv.budget", budget)

    assert "depthkv.budget" in refused(cli("inspect", write_llama(tmp_path / "m.gguf", add)))
