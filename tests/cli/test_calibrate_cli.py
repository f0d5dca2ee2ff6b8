"""The command: a packaged model end to end, one line and exit code 2 for what is wrong, nothing but JSON on demand."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from conftest import Outcome, run_python
from support.outcome import refused, run_here
from support.tiny_hf import save_pair

from depthkv_edge.modelfile.keys import read_calibration

# numbers that make a run short; the curves are coarse
SHORT = ["--windows", "2", "--window-tokens", "512", "--ratios", "0.2,0.4"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def calibrate(capfd) -> Callable[..., Outcome]:
    return partial(run_here, capfd, "calibrate")


def test_packaged_model_end_to_end(cli, tmp_path):
    output = tmp_path / "smollm2-depthkv.gguf"
    curves = tmp_path / "curves.json"
    options = [*SHORT, "--recall", 1, "--method", "fast", "--json", "--curves", curves]
    done = cli("calibrate", "smollm2", "-o", output, *options)
    found = done.json()
    assert all(line.startswith(("measuring: ", "checking: ")) for line in done.err.splitlines()), "on a slow machine"
    carried = read_calibration(output)
    assert carried.layer_ids == tuple(range(30)) == tuple(found["layer_ids"])
    np.testing.assert_allclose(carried.sensitivity, found["sensitivity"], rtol=1e-6)
    assert (np.diff(carried.sensitivity, axis=1) <= 0).all() and (carried.sensitivity[:, 0] > 0).all()
    assert carried.model == "smollm2" and carried.method == "fast"
    assert -1 <= carried.stability <= 1
    assert found["held_out"]["uniform"] > 0
    assert found["rule"] == carried.rule == ("uniform" if found["held_out"]["gain"] <= 1 else "optimal")
    dumped = json.loads(curves.read_text())
    assert np.array(dumped["per_window"]).shape == (2, 30, 2)
    assert np.array(dumped["per_recall_window"]).shape == (1, 30, 2)
    assert found["recall_windows"] == carried.recall_windows == 1
    assert sorted(os.listdir(tmp_path)) == ["curves.json", "smollm2-depthkv.gguf"]


def test_summary(calibrate, pair, tmp_path):
    repo, gguf = pair
    done = calibrate(repo, "--gguf", gguf, "-o", tmp_path / "out.gguf", *SHORT, "--method", "both")
    assert (done.code, done.out) == (0, "")
    said = "".join(done.err.split())
    assert all(word in said for word in ("stability", "gain", "written", "out.gguf", "Spearmanwithexact"))


@pytest.mark.parametrize(
    ("arguments", "parts"), [(["--ratios", "a,b"], ["--ratios a,b", "0.05,0.1"]), ([], ["--gguf"])]
)
def test_one_line(calibrate, pair, tmp_path, arguments, parts):
    line = refused(calibrate(pair[0], "-o", tmp_path / "out.gguf", *arguments))
    assert all(part in line for part in parts), line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("package", ["torch", "transformers", "accelerate"])
def test_a_missing_package_names_the_extra(calibrate, monkeypatch, package):
    monkeypatch.setattr("depthkv_edge.cli.calibrate.find_spec", lambda name: None if name == package else name)
    line = refused(calibrate("smollm2", "-o", "out.gguf", "--method", "fast"))
    assert package in line and "pip install" in line and "depthkv-edge[calibrate]" in line and "engine" in line


def test_without_torch_the_engine_measures(calibrate, monkeypatch, pair, tmp_path):
    """And says so; what it cannot measure it refuses."""
    monkeypatch.setattr("depthkv_edge.cli.calibrate.find_spec", lambda name: None if name == "torch" else name)
    output = tmp_path / "out.gguf"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog. " * 80)
    options = ["--corpus", corpus, "--windows", 1, "--recall", 0, "--window-tokens", 512, "--ratios", "0.3"]
    done = calibrate(pair[1], "-o", output, *options, "--json")
    assert done.err.splitlines()[0] == "torch is not installed: the engine measures the GGUF (--method engine)"
    assert done.json()["method"] == read_calibration(output).method == "engine"
    refusal = calibrate(pair[0], "-o", output, *options)
    assert refusal.code == 2 and "is no GGUF" in refusal.err.splitlines()[-1]


@pytest.mark.parametrize("error", [ImportError("cannot import name\n DynamicLayer"), OSError("DynamicLayer.so")])
def test_a_broken_package_names_the_extra(calibrate, monkeypatch, error):
    class Broken:
        def find_spec(self, name, path, target=None):
            if name == "depthkv_edge.calibrate.calibrate":
                raise error

    monkeypatch.delitem(sys.modules, "depthkv_edge.calibrate.calibrate", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    line = refused(calibrate("smollm2", "-o", "out.gguf"))
    assert "DynamicLayer" in line and "pip install" in line and "depthkv-edge[calibrate]" in line


def test_refusals_need_no_torch():
    program = """
import sys
from depthkv_edge.cli.main import main
try:
    main()
finally:
    assert not {"torch", "transformers"} & set(sys.modules)
"""
    refused(run_python("-c", program, "calibrate", "smollm2", "-o", "out.gguf", "--ratios", "a,b"))


def test_curves_that_cannot_be_written(calibrate, pair, tmp_path):
    """If that is found out after the work, the file and the summary are there all the same. Of one window, here."""
    short = ["--windows", 1, "--window-tokens", 480, "--ratios", "0.4", "--method", "fast"]
    found = calibrate(pair[0], "--gguf", pair[1], "-o", tmp_path / "out.gguf", *short, "--curves", "/dev/full")
    assert found.code == 2 and "written" in found.err and "nan" not in found.err
    assert found.err.splitlines()[-1] == "depthkv-edge: /dev/full cannot be written: No space left on device"
    assert sorted(os.listdir(tmp_path)) == ["out.gguf", "out.gguf.calibration.0.json"]
