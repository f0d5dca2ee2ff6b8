"""Calibration by the engine: what the reference finds, without torch, of the weights as they are."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import run_python
from support.tiny_hf import N_LAYERS, save_pair

from depthkv_edge.calibrate import engine_measurement
from depthkv_edge.calibrate.by_engine import calibrate_with_engine
from depthkv_edge.calibrate.calibrate import calibrate
from depthkv_edge.calibrate.calibrate_settings import ENGINE, RECALL, CalibrateSettings
from depthkv_edge.calibrate.corpus import WindowTokens
from depthkv_edge.calibrate.curves import curve_correlation
from depthkv_edge.calibrate.engine_window import open_engine_window
from depthkv_edge.calibrate.layer_cells import LayerCells
from depthkv_edge.calibrate.state import SavedState
from depthkv_edge.engine.model import load_model
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.keys import read_calibration

LAYERS = range(N_LAYERS)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(60)]
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text(" ".join(rng.choices(words, k=2000)))
    return path


@pytest.fixture
def settings(pair, corpus, tmp_path) -> CalibrateSettings:
    return CalibrateSettings(
        str(pair[1]),
        None,
        tmp_path / "out.gguf",
        corpus=(str(corpus),),
        windows=2,
        recall=0,
        window_tokens=480,
        ratios=(0.3, 0.5),
        method=ENGINE,
    )


@pytest.fixture(scope="module")
def model(pair):
    with load_model(pair[1], 1) as model:
        yield model


@pytest.fixture
def window(model, corpus):
    """480 tokens, the last 40 of them the tail."""
    tokens = tuple(model.tokenize(corpus.read_text()[:480]))
    with open_engine_window(model, WindowTokens(0, tokens), 40, "attention") as window:
        yield window


def test_it_finds_what_the_reference_finds(settings, pair):
    settings = replace(settings, windows=4)
    outcome = calibrate_with_engine(settings)
    reference = calibrate(
        replace(settings, model=str(pair[0]), gguf=pair[1], output=settings.output.with_name("b.gguf"), method="exact")
    )
    assert curve_correlation(outcome.measured.reshape(-1, 2), reference.measured.reshape(-1, 2)) > 0.8
    ratio = outcome.measured.sum() / reference.measured.sum()
    assert 0.5 < ratio < 2, "the tails differ in length, and in what is forgotten within them"
    found, expected = read_calibration(outcome.output), read_calibration(reference.output)
    assert (found.method, expected.method) == ("engine", "exact")
    assert found.layer_ids == expected.layer_ids and found.corpus == expected.corpus
    assert found.gain == pytest.approx(outcome.held_out.gain, rel=1e-5)
    assert 0.4 < outcome.held_out.uniform / reference.held_out.uniform < 2.5
    assert sorted(os.listdir(settings.output.parent)) == ["b.gguf", "out.gguf"]


def test_no_torch(settings):
    program = """
import sys
from pathlib import Path
from depthkv_edge.cli.main import main
try:
    main()
finally:
    assert not {"torch", "transformers", "scipy"} & set(sys.modules)
"""
    options = ["--window-tokens", "480", "--ratios", "0.3,0.5", "--windows", "1", "--recall", "0", "--method", "engine"]
    corpus = ["--corpus", settings.corpus[0]]
    done = run_python("-c", program, "calibrate", settings.model, "-o", str(settings.output), *options, *corpus)
    assert done.code == 0, done.err
    assert read_calibration(settings.output).method == "engine"


def test_a_layer_that_forgets(window, model):
    """More is lost the less is kept, nothing where all is, and each measurement begins at the same state."""
    plans = [LayerCells((cells,) * N_LAYERS) for cells in (480, 320, 96)]
    lost = np.array([[window.lose(i, plan) for plan in plans] for i in LAYERS])
    assert (lost[:, 0] == 0).all()
    assert (lost[:, 2] > lost[:, 1]).all() and (lost[:, 1] > 0).all()
    assert window.lose(0, plans[2]) == lost[0, 2]
    assert window.lose_all(plans[0]) == 0
    assert window.lose_all(plans[2]) > lost[:, 2].max()
    one = [window.noise(i, 200) for i in LAYERS]
    assert all(0 < a < b for a, b in zip(one, lost[:, 1], strict=True))


def test_only_what_is_asked_counts(model, corpus):
    tokens = tuple(model.tokenize(corpus.read_text()[:480]))
    plan = LayerCells((128,) * N_LAYERS)

    def lose(asked: tuple[int, ...]) -> float:
        with open_engine_window(model, WindowTokens(0, tokens, asked, 40), 7, "attention") as window:
            return window.lose(1, plan)

    assert lose((441, 479)) == pytest.approx((lose((441,)) + lose((479,))) / 2)
    assert lose((441,)) != pytest.approx(lose((479,)), rel=1e-3)


def test_an_interrupted_calibration_goes_on(settings, monkeypatch):
    whole = calibrate_with_engine(settings)
    settings = replace(settings, output=settings.output.with_name("again.gguf"))
    put, done = SavedState.put, []

    def interrupt(self, method, window, layers):
        put(self, method, window, layers)
        done.append((method, window, *layers))
        if len([each for each in done if each[0] == ENGINE]) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SavedState, "put", interrupt)
        calibrate_with_engine(settings)
    assert not settings.output.exists()
    monkeypatch.setattr(SavedState, "put", lambda self, *args: done.append((*args[:2], *args[2])) or put(self, *args))
    said = []
    outcome = calibrate_with_engine(settings, said.append)
    assert len(done) == len(set(done)), "nothing is measured twice"
    np.testing.assert_array_equal(outcome.measured, whole.measured)
    assert "going on" in said[0]
    assert sorted(os.listdir(settings.output.parent)) == ["again.gguf", "out.gguf"]


class _Known:
    """A window in which each layer loses a known amount, and any change costs noise."""

    past, tail = range(100), range(10)

    def __init__(self, lost, noise):
        self.lost, self.noise_of, self.runs = lost, noise, []

    def lose(self, i, plan):
        self.runs.append((i, plan.cells[0]))
        return self.lost[i][(160, 256).index(plan.cells[0])] + self.noise_of[i]

    def noise(self, i, position):
        return self.noise_of[i]


def measured(settings, model, window, method=ENGINE) -> np.ndarray:
    state = SavedState(settings.output, "x")
    work = engine_measurement._Measured(settings, model, state, method, 0, WindowTokens(0, ()), lambda n: None)
    work._run(window)
    return np.array([state.get(method, 0, layer) for layer in LAYERS])


@pytest.mark.parametrize("method", [ENGINE, RECALL])
def test_what_matters_is_measured_first_and_longest(settings, model, method):
    """Noise falls with the layer, and is not what a layer loses."""
    window = _Known([[2.0, 1.0], [0.01, 7.0], [8.0, 9.0], [0.5, 0.0]], [0.4, 0.3, 0.2, 0.1])
    found = measured(settings, model, window, method)
    assert [i for i, cells in window.runs if cells == 256] == [2, 0, 3]
    np.testing.assert_allclose(found[[0, 2, 3]], [[2, 1], [8, 9], [0.5, 0]], atol=1e-9)
    fall = (0.5 / 0.7) if method == RECALL else (0.5 / 0.5) ** 1.5 / (0.7 / 0.3) ** 1.5
    np.testing.assert_allclose(found[1], [0.01, 0.01 * fall], rtol=1e-9)


def test_what_noise_hides_is_not_measured_further(settings, model):
    window = _Known([[2.0, 1.0], [0.3, 0.2], [0.0, 0.0], [-0.1, 0.0]], [0.5, 0.1, 0.5, 0.1])
    found = measured(settings, model, window)
    assert [i for i, cells in window.runs if cells == 256] == [0]
    assert (found >= 0).all() and np.isfinite(found).all()


def test_a_loss_that_is_no_number_is_refused(settings, model):
    window = _Known([[2.0, 1.0], [np.nan, 0.2], [0.0, 0.0], [0.1, 0.0]], [0.0] * 4)
    with pytest.raises(DepthKVError, match="layer 1 loses in window 0 is nan"):
        measured(settings, model, window)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"device": "cuda"}, ["--device cuda", "CPU"]),
        ({"dtype": "float16"}, ["--dtype float16", "--gguf"]),
        ({"model": "."}, ["model . ", "torch"]),
        ({"model": "somebody/model"}, ["somebody/model", "torch"]),
        ({"model": "none.gguf"}, ["none.gguf", "does not exist"]),
        ({"window_tokens": 2000}, ["--window-tokens 2000", "at most 1024"]),
    ],
)
def test_refusals(settings, change, parts):
    with pytest.raises(DepthKVError) as error:
        calibrate_with_engine(replace(settings, **change))
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
    assert not settings.output.exists()


def test_the_file_of_another_model(settings, smollm2):
    with pytest.raises(DepthKVError, match="is not the model of"):
        calibrate_with_engine(replace(settings, gguf=smollm2))


def test_weights_as_they_are(settings, monkeypatch):
    """A model too large for F32 is measured as it is."""
    loaded = []
    monkeypatch.setattr("depthkv_edge.calibrate.by_engine._F32_BYTES", 1000)
    monkeypatch.setattr(
        "depthkv_edge.calibrate.by_engine.load_model",
        lambda path, n_threads: loaded.append(str(path)) or load_model(path, n_threads),
    )
    calibrate_with_engine(settings)
    assert loaded == [settings.model]


def test_no_room_for_a_copy(settings, monkeypatch):
    """It is said, and the weights are measured as they are."""
    said = []

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("depthkv_edge.calibrate.by_engine.write_f32", full)
    calibrate_with_engine(settings, said.append)
    assert len(said) == 1 and "as they are" in said[0] and "No space left" in said[0]
