"""A calibration from beginning to end on a tiny model: what is written, and what happens when it is interrupted."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from safetensors.torch import load_file, save_file
from support.keys import write
from support.tiny_hf import make_model, save_pair

from depthkv_edge.calibrate import exact, fast, heldout
from depthkv_edge.calibrate.calibrate import calibrate
from depthkv_edge.calibrate.calibrate_settings import CalibrateSettings
from depthkv_edge.calibrate.load import find_source, load_model
from depthkv_edge.calibrate.outcome import check_dump, dump_curves
from depthkv_edge.calibrate.state import SavedState
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.keys import KeyValue, read_calibration
from depthkv_edge.modelfile.writer import write_calibrated


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("tiny"))


def settings_of(pair, directory: Path) -> CalibrateSettings:
    repo, gguf = pair
    return CalibrateSettings(
        str(repo), gguf, directory / "out.gguf", windows=2, recall=0, window_tokens=480, ratios=(0.3, 0.5)
    )


@pytest.fixture
def settings(pair, tmp_path):
    return settings_of(pair, tmp_path)


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
    """The outcome with these settings, in one process and without an interruption."""
    return calibrate(settings_of(pair, tmp_path_factory.mktemp("alone")))


def same_curves(a, b) -> bool:
    return bool(np.abs(a.measured - b.measured).max() < 1e-6)


@pytest.fixture
def layers_measured(monkeypatch):
    """The layers that `exact` is asked for, in order."""
    asked = []
    measure = exact.measure_layer
    monkeypatch.setattr(exact, "measure_layer", lambda window, layer: asked.append(layer) or measure(window, layer))
    return asked


def interrupted(settings, monkeypatch, after: int = 1) -> None:
    """Calibrate until so many measurements of a layer are kept."""
    put, n_put = SavedState.put, 0

    def interrupt(self, *args):
        nonlocal n_put
        put(self, *args)
        n_put += 1
        if n_put == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SavedState, "put", interrupt)
        calibrate(settings)
    assert not settings.output.exists()


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_the_file_carries_what_was_measured(settings, alone, method):
    outcome = alone if method == "exact" else calibrate(replace(settings, method=method))
    found = read_calibration(outcome.output)
    assert found.layer_ids == (0, 1, 2, 3)
    assert found.keep_ratios == (0.3, 0.5)
    np.testing.assert_allclose(found.sensitivity, outcome.calibration.sensitivity)
    assert (found.sensitivity > 0).all() and (found.sensitivity_se > 0).all()
    assert (found.scorer, found.sink_tokens, found.recent_tokens) == ("attention", 4, 32)
    assert (found.windows, found.window_tokens, found.tokens, found.method) == (2, 480, 960, method)
    assert found.model == settings.model and "sha256:" in found.corpus
    assert found.gain == pytest.approx(outcome.held_out.gain, rel=1e-5)
    assert found.rule == outcome.held_out.rule
    assert os.listdir(outcome.output.parent) == ["out.gguf"]


def test_same_seed_same_curves(settings, alone):
    """Wherever the model lies: `auto` is accelerate's device map."""
    assert same_curves(alone, calibrate(replace(settings, device="auto")))
    assert not same_curves(alone, calibrate(replace(settings, seed=1)))


def test_both_methods_are_compared(settings):
    outcome = calibrate(replace(settings, method="both"))
    assert outcome.calibration.method == "exact"
    assert all(-1 <= x <= 1 for x in outcome.agreement)
    found = outcome.to_dict()
    assert found["fast_agreement"] == list(outcome.agreement)
    assert found["seconds"].keys() == {"exact", "fast"} and min(found["seconds"].values()) > 0


def test_what_the_check_decides(settings, monkeypatch):
    """No gain asks for uniform, no loss at all has no gain in numbers, and what is no number is refused."""
    monkeypatch.setattr(exact, "measure_layer", lambda window, layer: [0.2, 0.1])
    for held_out, rule, gain in ((0.1, 0.125), "uniform", 0.8), ((0.1, 0.0), "optimal", None):
        check = heldout.HeldOut(*held_out)
        monkeypatch.setattr("depthkv_edge.calibrate.calibrate.check", lambda *args, check=check: check)
        outcome = calibrate(settings)
        found = read_calibration(settings.output)
        assert found.rule == rule and outcome.to_dict()["held_out"]["gain"] == gain
        assert math.isnan(found.gain) if gain is None else found.gain == gain
    settings.output.unlink()
    check = heldout.HeldOut(0.1, math.nan)
    monkeypatch.setattr("depthkv_edge.calibrate.calibrate.check", lambda *args: check)
    with pytest.raises(DepthKVError, match="held-out windows is nan"):
        calibrate(settings)
    assert not settings.output.exists()


def test_a_broken_budget_of_the_file(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("depthkv_edge.calibrate.calibrate.load_model", lambda *args: pytest.fail("loaded"))
    path = write(tmp_path / "broken.gguf", [KeyValue("depthkv.budget", 1.5, GGUFValueType.FLOAT32, None)])
    with pytest.raises(DepthKVError, match="broken.gguf: key 'depthkv.budget' is 1.5"):
        calibrate(replace(settings, gguf=path))


@pytest.mark.parametrize(("method", "broken"), [("exact", math.nan), ("fast", math.inf)])
def test_what_is_not_finite_is_refused_and_not_kept(settings, monkeypatch, method, broken):
    if method == "exact":
        measure = exact.measure_layer
        monkeypatch.setattr(
            exact, "measure_layer", lambda window, layer: [0.1, broken] if layer == 2 else measure(window, layer)
        )
    else:
        monkeypatch.setattr(fast, "measure_window", lambda *args: dict.fromkeys(range(4), [0.1, broken]))
    line = f"layer {2 if method == 'exact' else 0} loses in window 0 is {broken} with --dtype bfloat16.*--dtype float32"
    with pytest.raises(DepthKVError, match=line):
        calibrate(replace(settings, method=method, dtype="bfloat16"))
    assert not settings.output.exists()
    for path in settings.output.parent.iterdir():
        assert all(map(math.isfinite, sum(json.loads(path.read_text())["measured"].values(), [])))


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory(settings, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(exact, "measure_layer", fail)
    with pytest.raises(DepthKVError, match="--window-tokens 480 on --device cpu.*same command goes on"):
        calibrate(settings)


def test_another_error_stays_what_it_is(settings, monkeypatch):
    monkeypatch.setattr(exact, "measure_layer", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(settings)


def damaged(pair, directory: Path, edit) -> str:
    shutil.copytree(pair[0], directory)
    edit(directory / "model.safetensors")
    return str(directory)


def test_missing_weights(settings, pair, tmp_path):
    def edit(path: Path) -> None:
        weights = load_file(path)
        del weights["model.layers.1.mlp.up_proj.weight"], weights["model.layers.2.mlp.up_proj.weight"]
        save_file(weights, path, metadata={"format": "pt"})

    with pytest.raises(DepthKVError, match=r"weight model.layers.1.mlp.up_proj.weight is missing, 2 in all"):
        calibrate(replace(settings, model=damaged(pair, tmp_path / "hf", edit)))


def test_tied_weights_are_not_missing(tmp_path):
    model = make_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_model(find_source(str(tmp_path)), "cpu", "float32")


def test_truncated_weights(settings, pair, tmp_path):
    def edit(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:2000])

    with pytest.raises(DepthKVError, match="the model of .* cannot be loaded") as error:
        calibrate(replace(settings, model=damaged(pair, tmp_path / "hf", edit)))
    assert "\n" not in str(error.value)


def test_code_of_a_model_is_not_run(settings, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    repo = Path(damaged(pair, tmp_path / "hf", lambda path: None))
    config = json.loads((repo / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (repo / "config.json").write_text(json.dumps(config))
    (repo / "own.py").write_text("raise SystemExit(7)")
    with pytest.raises(DepthKVError, match="the configuration of .*hf cannot be loaded"):
        calibrate(replace(settings, model=str(repo)))


def test_in_place_the_budget_of_the_file_stays(settings, alone):
    write_calibrated(alone.output, settings.output, replace(read_calibration(alone.output), budget=0.5, tool="old"))
    calibrate(replace(settings, gguf=settings.output))
    found = read_calibration(settings.output)
    assert found.budget == 0.5 and found.tool != "old"


@pytest.mark.parametrize("n_before", [1, 6])
def test_an_interrupted_calibration_goes_on(settings, alone, layers_measured, monkeypatch, n_before):
    interrupted(settings, monkeypatch, n_before)
    said = []
    resumed = calibrate(settings, said.append)
    assert layers_measured == [0, 1, 2, 3, 0, 1, 2, 3]  # none twice
    assert any("going on" in line and str(n_before) in line for line in said)
    assert os.listdir(settings.output.parent) == ["out.gguf"]
    assert same_curves(resumed, alone)


def test_another_setting_starts_over(settings, layers_measured, monkeypatch):
    interrupted(settings, monkeypatch)
    layers_measured.clear()
    said = []
    calibrate(replace(settings, ratios=(0.4, 0.5)), said.append)
    assert layers_measured == [0, 1, 2, 3, 0, 1, 2, 3]
    assert any("starting over" in line for line in said)


def test_a_broken_state_file_is_measured_again(settings, layers_measured):
    settings.output.with_name("out.gguf.calibration.0.json").write_text('{"fingerprint": ')
    calibrate(settings)
    assert layers_measured == [0, 1, 2, 3, 0, 1, 2, 3]


def test_another_method_keeps_what_is_measured(settings, layers_measured, monkeypatch):
    interrupted(settings, monkeypatch)
    calibrate(replace(settings, method="fast"))
    kept = json.loads(settings.output.with_name("out.gguf.calibration.0.json").read_text())["measured"]
    assert list(kept) == ["exact 0 0"]
    calibrate(settings)
    assert layers_measured == [0, 1, 2, 3, 0, 1, 2, 3]
    assert os.listdir(settings.output.parent) == ["out.gguf"]


def test_what_fails_at_the_end_keeps_what_is_measured(settings, layers_measured):
    def fail(outcome):
        raise DepthKVError("no space")

    with pytest.raises(DepthKVError, match="no space"):
        calibrate(settings, on_outcome=fail)
    assert read_calibration(settings.output) is not None
    found = []
    outcome = calibrate(settings, on_outcome=found.append)
    assert found == [outcome] and outcome.seconds == {"exact": 0.0}
    assert layers_measured == [0, 1, 2, 3, 0, 1, 2, 3]


def test_state_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    state = SavedState(tmp_path / "out.gguf", "x")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DepthKVError, match="No space left on device"):
        state.put("exact", 0, {0: [1.0]})
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(Path, "unlink", full)
    with pytest.raises(DepthKVError, match="No space left on device"):
        state.put("exact", 0, {0: [1.0]})


def test_two_processes_measure_what_one_does(settings, alone, tmp_path):
    arguments = [settings.model, "--gguf", settings.gguf, "-o", tmp_path / "two.gguf", "--windows", 2, "--recall", 0]
    arguments += ["--window-tokens", 480, "--ratios", "0.3,0.5", "--json"]
    script = tmp_path / "calibrate_two.py"
    script.write_text("from depthkv_edge.cli.calibrate import calibrate; calibrate()")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run([*map(str, launch), *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(done.stdout)
    np.testing.assert_allclose(two["sensitivity"], alone.calibration.sensitivity, atol=1e-6)
    assert sorted(os.listdir(tmp_path)) == ["calibrate_two.py", "two.gguf"]


def test_dumped_curves_have_every_window(alone, tmp_path):
    dump_curves(alone, tmp_path / "curves.json")
    assert np.array(json.loads((tmp_path / "curves.json").read_text())["per_window"]).shape == (2, 4, 2)
    with pytest.raises(DepthKVError, match="cannot be written"):
        dump_curves(alone, tmp_path / "none" / "curves.json")


def test_where_curves_may_go(settings, tmp_path):
    check_dump(tmp_path / "curves.json", settings)
    assert os.listdir(tmp_path) == []
    for path in (tmp_path, tmp_path / "none" / "curves.json"):
        with pytest.raises(DepthKVError, match="cannot be written: .*directory"):
            check_dump(path, settings)
    for path in (settings.gguf, settings.output):
        with pytest.raises(DepthKVError, match="is the model file"):
            check_dump(path, settings)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"gguf": None}, ["--gguf"]),
        ({"windows": 0}, ["--windows 0"]),
        ({"window_tokens": 479}, ["--window-tokens 479", "480"]),
        ({"window_tokens": 600, "ratios": (0.1, 0.5)}, ["--window-tokens 600", "680"]),
        ({"window_tokens": 2048}, ["--window-tokens 2048", "1024"]),
        ({"ratios": (0.5, 0.3)}, ["--ratios 0.5,0.3", "ascend"]),
        ({"ratios": (0.5, 1.0)}, ["--ratios 0.5,1", "between 0 and 1"]),
        ({"ratios": (float("nan"),)}, ["--ratios nan"]),
        ({"scorer": "magic"}, ["'magic'", "attention"]),
        ({"device": "cuda"}, ["cuda", "cpu"]),
        ({"device": "vulkan:0"}, ["vulkan:0", "cpu"]),
        ({"gguf": Path("none.gguf")}, ["none.gguf", "does not exist"]),
        ({"gguf": Path("smollm2")}, ["30 layers", "has 4"]),
        ({"corpus": ("none.txt",)}, ["none.txt", "does not exist"]),
        ({"model": "./none"}, ["./none", "does not exist"]),
        ({"output": Path("none/out.gguf")}, ["none/out.gguf", "is not a directory"]),
    ],
)
def test_what_is_wrong_is_said_before_the_work(settings, monkeypatch, change, parts):
    monkeypatch.setattr("depthkv_edge.calibrate.measurement.prefill", lambda *args: pytest.fail("measured"))
    with pytest.raises(DepthKVError) as error:
        calibrate(replace(settings, **change))
    line = str(error.value)
    assert all(part in line for part in parts), line
    assert "\n" not in line
    assert not settings.output.exists()


def test_another_model(settings, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    _, gguf = save_pair(other, seed=1)
    with pytest.raises(DepthKVError, match="tensor"):
        calibrate(replace(settings, gguf=gguf))


@pytest.mark.parametrize(
    ("config", "files", "why"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, [], "BertModel.*no language-model head"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ["modules.json"], "embedding .*modules.json"),
    ],
)
def test_an_embedding_model(settings, tmp_path, config, files, why):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in files:
        (tmp_path / name).write_text("[]")
    with pytest.raises(DepthKVError, match=why):
        calibrate(replace(settings, model=str(tmp_path)))


def test_an_embedding_model_of_the_hub(settings, monkeypatch):
    asked = []
    config = make_model("llama").config
    module = "depthkv_edge.calibrate.load"
    monkeypatch.setattr(f"{module}.AutoConfig.from_pretrained", lambda *args, **kwargs: config)
    monkeypatch.setattr(f"{module}.cached_file", lambda *args, **kwargs: asked.append(args) or "modules.json")
    with pytest.raises(DepthKVError, match="owner/embedder: it is an embedding model"):
        calibrate(replace(settings, model="owner/embedder"))
    assert asked == [("owner/embedder", "modules.json")]
