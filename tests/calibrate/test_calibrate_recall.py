"""Windows that hide facts and ask for them: what is in them, and what of them is measured."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_hf import save_pair

from depthkv_edge.calibrate import measurement
from depthkv_edge.calibrate.calibrate import calibrate
from depthkv_edge.calibrate.calibrate_settings import RECALL, CalibrateSettings
from depthkv_edge.calibrate.corpus import build_corpus
from depthkv_edge.calibrate.curves import RECALL_SHARE, build_curves
from depthkv_edge.calibrate.divergence import divergence
from depthkv_edge.calibrate.layer_cells import LayerCells
from depthkv_edge.calibrate.load import find_source, load_model
from depthkv_edge.calibrate.recall import build_window, draw_facts
from depthkv_edge.calibrate.state import SavedState
from depthkv_edge.calibrate.target import inspect_model
from depthkv_edge.calibrate.window import prefill, run_tail
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.keys import read_calibration

FILLER = "The quick brown fox jumps over the lazy dog. " * 200


def tokenize(text: str) -> list[int]:
    """A token for each character, so that a window can be read."""
    return [ord(letter) for letter in text]


def text_of(tokens) -> str:
    return "".join(map(chr, tokens))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(pair, tmp_path):
    repo, gguf = pair
    return CalibrateSettings(
        str(repo), gguf, tmp_path / "out.gguf", windows=1, recall=1, window_tokens=480, ratios=(0.3, 0.5)
    )


@given(st.integers(0, 2**32), st.integers(1500, 6000), st.integers(1, 180))
def test_what_is_asked_is_in_the_text(seed, n_tokens, n_tail):
    window = build_window(tokenize, tokenize(FILLER), n_tokens, n_tail, random.Random(seed))
    assert len(window.tokens) == n_tokens
    body, tail = text_of(window.tokens[: -window.n_tail]), text_of(window.tokens[-window.n_tail :])
    first = draw_facts(random.Random(seed))
    chosen = [fact for fact in first if f"\n\n{fact.question}{fact.answer}" in tail]
    assert chosen == first[: len(chosen)] and tail == "".join(f"\n\n{fact.question}{fact.answer}" for fact in chosen)
    assert window.n_tail <= n_tail or len(chosen) == 1
    for fact in chosen:
        assert body.count(f"\n\n{fact.statement}\n\n") == 1
        assert fact.answer in fact.statement
    assert text_of(window.tokens[at] for at in window.asked) == "".join(fact.answer for fact in chosen)
    assert all(at > n_tokens - window.n_tail for at in window.asked), "something comes before, which predicts it"


def test_facts_are_of_every_kind_and_of_different_names():
    facts = draw_facts(random.Random(3))
    words = ("Which", "In the table", "assert", "Where did", "Le numéro", "Frage", "Pregunta")
    assert all(any(fact.question.find(word) >= 0 for fact in facts) for word in words)
    assert len({fact.question for fact in facts}) == len(facts)


def test_a_window_that_is_too_short():
    with pytest.raises(DepthKVError, match="--window-tokens 100 is too short to hide facts.*or --recall 0"):
        build_window(tokenize, tokenize(FILLER), 100, 50, random.Random(0))


def test_windows_that_ask_lie_elsewhere(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(60_000))))
    sizes = {"n_windows": 3, "n_held_out": 2, "window_tokens": 900, "seed": 0}
    corpus = build_corpus([str(path)], tokenize, 1, **sizes, n_recall=2)
    assert len(corpus.recall) == 2 and corpus.recall[0].tokens != corpus.recall[1].tokens
    for window in corpus.recall:
        assert len(window.tokens) == 900 and window.tokens[0] == 1
        assert window.n_tail <= 128 and window.asked[-1] == 899
        others = [text_of(other.tokens) for other in (*corpus.windows, *corpus.held_out)]
        assert not any(text_of(window.tokens[1:40]) in other for other in others)
    (held_out,) = corpus.held_out_recall
    assert text_of(held_out.tokens[1:20]) in text_of(corpus.held_out[-1].tokens) and held_out.asked[-1] == 899
    assert build_corpus([str(path)], tokenize, 1, **sizes).held_out_recall == ()
    again = build_corpus([str(path)], tokenize, 1, **sizes, n_recall=2)
    assert again == corpus != build_corpus([str(path)], tokenize, 1, **(sizes | {"seed": 1}), n_recall=2)


def test_only_the_answers_count(pair):
    target = inspect_model(load_model(find_source(str(pair[0])), "cpu", "float32"))
    tokens, n_tail, asked = [2 + at * at % 50 for at in range(200)], 40, (170, 171, 199)
    plans = (LayerCells((96,) * len(target.layer_ids)),)
    some = run_tail(prefill(target, tokens, n_tail, "streaming", plans, asked=asked))
    whole = run_tail(prefill(target, tokens, n_tail, "streaming", plans))
    rows = [at - 1 - 160 for at in asked]
    torch.testing.assert_close(some.reference, whole.reference[rows])
    assert some.rerun({1: 0}) != pytest.approx(whole.rerun({1: 0}), rel=1e-3)
    alone = run_tail(prefill(target, tokens, n_tail, "streaming", plans, asked=asked[:1])).rerun({1: 0})
    rest = run_tail(prefill(target, tokens, n_tail, "streaming", plans, asked=asked[1:])).rerun({1: 0})
    assert some.rerun({1: 0}) == pytest.approx((alone + 2 * rest) / 3, rel=1e-4)
    assert divergence(some.reference, whole.reference[rows]).max() < 1e-6


def test_both_kinds_of_windows_make_the_curves():
    text = np.array([[[4.0, 2.0], [2.0, 0.0]]])
    recall = np.array([[[0.0, 0.0], [300.0, 100.0]], [[0.0, 0.0], [3.0, 1.0]]])
    curves = build_curves(text, [0], recall)
    # scaled to the level of the text, whose mean is 2
    expected = (1 - RECALL_SHARE) * text[0] + RECALL_SHARE * 2 * np.array([[0, 0], [3, 1]])
    np.testing.assert_allclose(curves.sensitivity, expected)
    np.testing.assert_allclose(build_curves(text, [0], 0 * recall).sensitivity, text[0])
    np.testing.assert_allclose(build_curves(0 * text, [0], recall[1:]).sensitivity, recall[1])


def test_hidden_facts_are_measured_beside_the_text(settings):
    outcome = calibrate(settings)
    assert outcome.recall.shape == (1, 4, 2) and outcome.measured.shape == (1, 4, 2)
    assert outcome.recall.max() > 0
    assert read_calibration(settings.output).recall_windows == outcome.to_dict()["recall_windows"] == 1
    assert min(outcome.held_out.recall) > 0 and outcome.to_dict()["held_out"]["recall"] == outcome.held_out.recall
    expected = build_curves(outcome.measured, [0], outcome.recall).sensitivity
    np.testing.assert_allclose(outcome.calibration.sensitivity, expected)
    without = calibrate(replace(settings, recall=0))
    assert without.recall is None and read_calibration(settings.output).recall_windows == 0


def test_an_interrupted_window_of_facts_goes_on(settings, monkeypatch):
    """Half of the layers are screened when it stops: they are not run again."""
    whole = calibrate(settings)
    settings = replace(settings, output=settings.output.with_name("again.gguf"))
    put, done = SavedState.put, []

    def interrupt(self, method, window, layers):
        put(self, method, window, layers)
        done.append((method, *layers))
        if done[-1] == ("screen", 1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SavedState, "put", interrupt)
        calibrate(settings)
    monkeypatch.setattr(SavedState, "put", lambda self, *args: done.append((args[0], *args[2])) or put(self, *args))
    outcome = calibrate(settings)
    assert [layer for method, layer in done if method == "screen"] == [0, 1, 2, 3]
    np.testing.assert_allclose(outcome.recall, whole.recall)
    assert not list(settings.output.parent.glob("*.calibration.*"))


def test_layers_that_find_nothing_are_not_measured_further(settings, monkeypatch):
    runs = []

    class Known:
        def rerun(self, plans):
            ((layer, plan),) = plans.items()
            runs.append((layer, plan))
            return (10.0, 0.05, 4.0, 0.0)[layer] / (plan + 1)

    monkeypatch.setattr(measurement, "run_tail", lambda prefilled: Known())
    monkeypatch.setattr(measurement.exact, "measure_layer", lambda window, layer: [0.2, 0.1])
    monkeypatch.setattr("depthkv_edge.calibrate.calibrate._check", lambda *args: _Held())
    found = calibrate(settings).recall[0]
    assert [layer for layer, plan in runs if plan == 1] == [0, 2]
    np.testing.assert_allclose(found[[0, 2]], [[10, 5], [4, 2]])
    np.testing.assert_allclose(found[1], [0.05, 0.05 * 0.5 / 0.7])
    assert RECALL in measurement.methods_of(settings)
    assert RECALL not in measurement.methods_of(replace(settings, recall=0))


class _Held:
    uniform, calibrated, gain, rule = 0.2, 0.1, 2.0, "optimal"
