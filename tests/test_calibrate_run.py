"""A calibration from beginning to end on a tiny model: what is written, and what happens when it is interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny_hf import save_pair

from calibrate import exact, heldout
from calibrate.gguf_write import write_calibrated
from calibrate.run import Settings, calibrate, dump_curves
from calibrate.state import State
from depthkv_edge.calibration import read_calibration
from depthkv_edge.errors import DepthKVError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(pair, tmp_path):
    repo, gguf = pair
    return Settings(str(repo), gguf, tmp_path / "out.gguf", windows=2, window_tokens=256, ratios=(0.3, 0.5))


def same_curves(a, b) -> bool:
    return bool(np.abs(a.measured - b.measured).max() < 1e-6)


@pytest.fixture
def layers_measured(monkeypatch):
    """The layers that `exact` is asked for, in order."""
    asked = []
    measure = exact.measure_layer
    monkeypatch.setattr(exact, "measure_layer", lambda window, layer: asked.append(layer) or measure(window, layer))
    return asked


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_the_file_carries_what_was_measured(settings, method):
    outcome = calibrate(replace(settings, method=method))
    found = read_calibration(settings.output)
    assert found.layer_ids == (0, 1, 2, 3)
    assert found.keep_ratios == (0.3, 0.5)
    np.testing.assert_allclose(found.sensitivity, outcome.calibration.sensitivity)
    assert (found.sensitivity > 0).all() and (found.sensitivity_se > 0).all()
    assert (found.scorer, found.sink_tokens, found.recent_tokens) == ("attention", 4, 32)
    assert (found.windows, found.window_tokens, found.tokens, found.method) == (2, 256, 512, method)
    assert found.model == settings.model and "sha256:" in found.corpus
    assert found.gain == pytest.approx(outcome.held_out.gain, rel=1e-5)
    assert found.rule == outcome.held_out.rule
    assert os.listdir(settings.output.parent) == ["out.gguf"]


def test_same_seed_same_curves(settings):
    first = calibrate(settings)
    assert same_curves(first, calibrate(settings))
    assert not same_curves(first, calibrate(replace(settings, seed=1)))


def test_a_device_map_changes_nothing(settings):
    assert same_curves(calibrate(settings), calibrate(replace(settings, device="auto")))


def test_both_methods_are_compared(settings):
    outcome = calibrate(replace(settings, method="both"))
    assert outcome.calibration.method == "exact"
    assert all(-1 <= x <= 1 for x in outcome.agreement)
    assert outcome.to_dict()["fast_agreement"] == list(outcome.agreement)


def test_no_gain_asks_for_uniform(settings, monkeypatch):
    monkeypatch.setattr(heldout.HeldOut, "gain", property(lambda self: 0.8))
    calibrate(settings)
    assert read_calibration(settings.output).rule == "uniform"


def test_the_budget_of_the_file_stays(settings):
    calibrate(settings)
    write_calibrated(settings.output, settings.output, replace(read_calibration(settings.output), budget=0.5))
    calibrate(replace(settings, gguf=settings.output))
    assert read_calibration(settings.output).budget == 0.5


def test_in_place(settings, pair):
    copy = settings.output.with_name("model.gguf")
    copy.write_bytes(pair[1].read_bytes())
    calibrate(replace(settings, gguf=copy, output=copy))
    assert read_calibration(copy) is not None


@pytest.mark.parametrize("n_before", [1, 3, 6])
def test_an_interrupted_calibration_goes_on(settings, layers_measured, monkeypatch, n_before):
    put = State.put
    n_put = 0

    def interrupt(self, *args):
        nonlocal n_put
        put(self, *args)
        n_put += 1
        if n_put == n_before:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(State, "put", interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(settings)
    assert not settings.output.exists()
    said = []
    resumed = calibrate(settings, said.append)
    assert layers_measured == [0, 1, 2, 3, 0, 1, 2, 3]  # none twice
    assert any("going on" in line and str(n_before) in line for line in said)
    assert os.listdir(settings.output.parent) == ["out.gguf"]
    assert same_curves(resumed, calibrate(replace(settings, output=settings.output.with_name("again.gguf"))))


def test_another_setting_starts_over(settings, layers_measured, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(State, "remove", lambda self: None)
        calibrate(settings)
    layers_measured.clear()
    said = []
    calibrate(replace(settings, ratios=(0.4, 0.5)), said.append)
    assert layers_measured == [0, 1, 2, 3, 0, 1, 2, 3]
    assert any("starting over" in line for line in said)


def test_a_broken_state_file_is_measured_again(settings, layers_measured):
    settings.output.with_name("out.gguf.calibration.0.json").write_text('{"fingerprint": ')
    calibrate(settings)
    assert layers_measured == [0, 1, 2, 3, 0, 1, 2, 3]


def test_state_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    state = State(tmp_path / "out.gguf", "x")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DepthKVError, match="No space left on device"):
        state.put("exact", 0, {0: [1.0]})
    assert os.listdir(tmp_path) == []


def test_two_processes_measure_what_one_does(settings, tmp_path):
    alone = calibrate(settings)
    arguments = [settings.model, "--gguf", settings.gguf, "-o", tmp_path / "two.gguf", "--windows", 2]
    arguments += ["--window-tokens", 256, "--ratios", "0.3,0.5", "--json"]
    program = "from depthkv_edge.cli_calibrate import calibrate; calibrate()"
    script = tmp_path / "calibrate_two.py"
    script.write_text(program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511", script]
    done = subprocess.run([*map(str, launch), *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(done.stdout)
    np.testing.assert_allclose(two["sensitivity"], alone.calibration.sensitivity, atol=1e-6)
    assert sorted(os.listdir(tmp_path)) == ["calibrate_two.py", "out.gguf", "two.gguf"]


def test_dumped_curves_have_every_window(settings, tmp_path):
    outcome = calibrate(settings)
    dump_curves(outcome, tmp_path / "curves.json")
    dumped = json.loads((tmp_path / "curves.json").read_text())
    assert np.array(dumped["per_window"]).shape == (2, 4, 2)
    with pytest.raises(DepthKVError, match="cannot be written"):
        dump_curves(outcome, tmp_path / "none" / "curves.json")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"gguf": None}, ["--gguf"]),
        ({"windows": 0}, ["--windows 0"]),
        ({"window_tokens": 128}, ["--window-tokens 128", "227"]),
        ({"window_tokens": 2048}, ["--window-tokens 2048", "1024"]),
        ({"ratios": (0.5, 0.3)}, ["--ratios 0.5,0.3", "ascend"]),
        ({"ratios": (0.5, 1.0)}, ["--ratios 0.5,1", "between 0 and 1"]),
        ({"ratios": (float("nan"),)}, ["--ratios nan"]),
        ({"scorer": "magic"}, ["'magic'", "attention"]),
        ({"device": "cuda"}, ["cuda", "cpu"]),
        ({"corpus": ("none.txt",)}, ["none.txt", "does not exist"]),
        ({"model": "./none"}, ["./none", "does not exist"]),
    ],
)
def test_what_is_wrong_is_said_before_the_work(settings, monkeypatch, change, parts):
    monkeypatch.setattr("calibrate.run.prefill", lambda *args: pytest.fail("measured"))
    with pytest.raises(DepthKVError) as error:
        calibrate(replace(settings, **change))
    line = str(error.value)
    assert all(part in line for part in parts), line
    assert "\n" not in line
    assert not settings.output.exists()


def test_an_output_that_cannot_be_written(settings, tmp_path):
    with pytest.raises(DepthKVError, match="none"):
        calibrate(replace(settings, output=tmp_path / "none" / "out.gguf"))


def test_another_model(settings, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    _, gguf = save_pair(other, seed=1)
    with pytest.raises(DepthKVError, match="tensor"):
        calibrate(replace(settings, gguf=gguf))


def test_an_embedding_model(settings, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(DepthKVError, match="BertModel|tokenizer"):
        calibrate(replace(settings, model=str(tmp_path)))
