"""The command: a packaged model end to end, one line and exit code 2 for what is wrong, nothing but JSON on demand."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from conftest import run_python
from support.tiny_hf import save_pair

from depthkv_edge.modelfile.keys import read_calibration

# numbers that make a run short; the curves are coarse
SHORT = ["--windows", "2", "--window-tokens", "512", "--ratios", "0.2,0.4"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("tiny"))


def refused(outcome) -> str:
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1, outcome.err
    return outcome.err


def test_packaged_model_end_to_end(cli, tmp_path):
    output = tmp_path / "smollm2-depthkv.gguf"
    curves = tmp_path / "curves.json"
    done = cli("calibrate", "smollm2", "-o", output, *SHORT, "--method", "fast", "--json", "--curves", curves)
    found = done.json()
    assert done.err == ""
    carried = read_calibration(output)
    assert carried.layer_ids == tuple(range(30)) == tuple(found["layer_ids"])
    np.testing.assert_allclose(carried.sensitivity, found["sensitivity"], rtol=1e-6)
    assert (np.diff(carried.sensitivity, axis=1) <= 0).all() and (carried.sensitivity[:, 0] > 0).all()
    assert carried.model == "smollm2" and carried.method == "fast"
    assert -1 <= carried.stability <= 1
    assert found["held_out"]["uniform"] > 0
    assert found["rule"] == carried.rule == ("uniform" if found["held_out"]["gain"] <= 1 else "optimal")
    assert np.array(json.loads(curves.read_text())["per_window"]).shape == (2, 30, 2)
    assert sorted(os.listdir(tmp_path)) == ["curves.json", "smollm2-depthkv.gguf"]


def test_summary(cli, pair, tmp_path):
    repo, gguf = pair
    done = cli("calibrate", repo, "--gguf", gguf, "-o", tmp_path / "out.gguf", *SHORT, "--method", "both")
    assert (done.code, done.out) == (0, "")
    for word in ("stability", "gain", "written", "out.gguf", "Spearman with exact"):
        assert word in done.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--gguf"]),
        (["--ratios", "a,b"], ["--ratios a,b", "0.05,0.1"]),
        (["--method", "magic"], ["magic", "exact"]),
        (["--scorer", "magic"], ["'magic'", "attention"]),
        (["--windows", "many"], ["many"]),
    ],
)
def test_one_line(cli, pair, tmp_path, arguments, parts):
    line = refused(cli("calibrate", pair[0], "-o", tmp_path / "out.gguf", *arguments))
    assert all(part in line for part in parts), line
    assert os.listdir(tmp_path) == []


def test_wrong_model(cli, pair, smollm2, tmp_path):
    line = refused(cli("calibrate", pair[0], "--gguf", smollm2, "-o", tmp_path / "out.gguf", *SHORT))
    assert "4" in line and "30" in line and "layers" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("package", ["torch", "transformers", "accelerate", "scipy"])
def test_a_missing_package_names_the_extra(package, tmp_path):
    program = f"""
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else real(name, *rest)
from depthkv_edge.cli.main import main as cli
cli.main()
"""
    line = refused(run_python("-c", program, "calibrate", "smollm2", "-o", str(tmp_path / "out.gguf")))
    assert package in line and "pip install" in line and "depthkv-edge[calibrate]" in line


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["smollm2", "-o", "out.gguf", "--ratios", "a,b"], 2)]
)
def test_help_and_refusals_need_no_torch(arguments, code):
    program = """
import sys
from depthkv_edge.cli.main import main
try:
    main()
finally:
    assert not {"torch", "transformers"} & set(sys.modules)
"""
    found = run_python("-c", program, "calibrate", *arguments)
    assert (found.code, found.err.count("\n")) == (code, code // 2), found.err


@pytest.mark.parametrize("error", ["ImportError('cannot import name\\n DynamicLayer')", "OSError('libtorch.so')"])
def test_a_broken_package_names_the_extra(error, tmp_path):
    program = f"""
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "transformers.cache_utils":
            raise {error}
sys.meta_path.insert(0, Broken())
from depthkv_edge.cli.main import main as cli
cli.main()
"""
    line = refused(run_python("-c", program, "calibrate", "smollm2", "-o", str(tmp_path / "out.gguf")))
    assert (
        "pip install" in line and "depthkv-edge[calibrate]" in line and ("DynamicLayer" in line or "libtorch" in line)
    )


def test_curves_that_cannot_be_written(cli, pair, tmp_path):
    """Said before the work; if it is found out after it, the file and the summary are there all the same."""
    arguments = ["calibrate", pair[0], "--gguf", pair[1], "-o", tmp_path / "out.gguf", *SHORT]
    assert "is not a directory" in refused(cli(*arguments, "--curves", tmp_path / "none" / "curves.json"))
    assert os.listdir(tmp_path) == []
    found = cli(*arguments, "--curves", "/dev/full")
    assert found.code == 2 and "written" in found.err
    assert found.err.splitlines()[-1] == "depthkv-edge: /dev/full cannot be written: No space left on device"
    assert sorted(os.listdir(tmp_path)) == ["out.gguf", "out.gguf.calibration.0.json"]


def test_one_window(cli, pair, tmp_path):
    arguments = ["--windows", 1, "--window-tokens", 480, "--ratios", "0.4", "--method", "fast"]
    done = cli("calibrate", pair[0], "--gguf", pair[1], "-o", tmp_path / "out.gguf", *arguments)
    assert done.code == 0 and "nan" not in done.err and "written" in done.err
