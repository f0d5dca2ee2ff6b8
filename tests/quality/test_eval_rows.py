"""What is compared: names on a command line, streams that are shorter than the text, and records on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthkv_edge import DepthKVError
from depthkv_edge.engine.model import Cache, Model, load_model, log_softmax
from depthkv_edge.quality.bounded import open_stream
from depthkv_edge.quality.rows import METHODS, build_rows, check_budgets, check_methods, kv_bytes
from depthkv_edge.quality.store import Store

N_CTX = 512


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[Model]:
    with load_model(smollm2, n_threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def words(model: Model, text: str) -> list[int]:
    return model.tokenize(text[: 8 * N_CTX])[:N_CTX]


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "no method"),
        (["snapkv"], "'snapkv' is not known"),
        (["depth+kv-q5_0"], "'kv-q5_0' is not known"),
        (["kv-q8_0+depth"], "join a method and a type"),
        (["depth+uniform"], "join a method and a type"),
        (["depth+kv-q8_0+kv-q4_0"], "join a method and a type"),
        (["uniform", "uniform"], "twice"),
    ],
)
def test_methods_that_are_refused(names, says):
    check_methods([*METHODS, "depth+kv-q8_0", "uniform+kv-q4_0"])
    with pytest.raises(DepthKVError, match=says):
        check_methods(names)


@pytest.mark.parametrize("budgets", [[0.0], [1.0], [1.5], [-0.2], [float("nan")], [0.4, 0.4]])
def test_budgets_that_are_refused(budgets):
    with pytest.raises(DepthKVError):
        check_budgets(budgets)


def test_rows_that_are_refused_before_anything_runs(model, smollm2):
    with pytest.raises(DepthKVError, match="carries no calibration.*depthkv-edge calibrate.*leave depth out"):
        build_rows(model, smollm2, ["depth"], [0.4], N_CTX, seed=0)
    with pytest.raises(DepthKVError, match="below the floor"):
        build_rows(model, smollm2, ["uniform"], [0.05], N_CTX, seed=0)


def test_bytes_are_those_of_the_budget_and_the_type(model, smollm2):
    names = ["uniform", "uniform+kv-q8_0", "kv-q8_0", "kv-q4_0", "truncate"]
    rows = build_rows(model, smollm2, names, [0.5], N_CTX, 0)
    assert {row.label: kv_bytes(model, row, N_CTX).share for row in rows} == {
        "full": 1.0,
        "noise": 1.0,
        "uniform 0.5": 0.5,
        "uniform+kv-q8_0 0.5": 0.5 * 34 / 64,  # 34 bytes for 32 values, F16 takes 64
        "kv-q8_0": 34 / 64,
        "kv-q4_0": 18 / 64,
        "truncate 0.5": 0.5,
    }


# --- streams --------------------------------------------------------------------------------------------------------


def reference(model: Model, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of what follows the last of the tokens, from an empty cache."""
    with open_stream(model, N_CTX, Cache()) as stream:
        return stream.predict(tokens)[-1]


def test_a_full_stream_that_is_taken_back(model, words):
    with open_stream(model, N_CTX, Cache()) as stream:
        stream.feed(words[:100])
        state = stream.save()
        first = stream.predict(words[100:120])
        stream.restore(state)
        assert stream.past == words[:100]
        np.testing.assert_array_equal(stream.predict(words[100:120]), first)
        stream.clear()
        assert stream.past == [] and stream.occupancy().held == (0,) * model.n_layers


def test_a_smaller_window_reads_its_younger_half_again(model, words):
    """128 cells: when the 129th token comes, the last 64 are read again as if nothing had been before."""
    with open_stream(model, N_CTX, Cache()) as fresh:
        fresh.feed(words[64:128])  # in the same steps: on some processors the size of a batch shows in the logits
        expected = fresh.predict(words[128:129])
    with open_stream(model, N_CTX, Cache(), when_full="reread", n_cells=128) as stream:
        stream.feed(words[:128])
        np.testing.assert_allclose(stream.predict(words[128:129]), expected, atol=2e-3)
        occupancy = stream.occupancy()
    assert occupancy.positions[0] == tuple(range(64, 129))
    assert set(occupancy.held) == {65} and occupancy.n_seen == 129


def test_a_context_shift_drops_half_and_goes_on(model, words):
    with open_stream(model, N_CTX, Cache(), when_full="shift", n_cells=256) as stream:
        stream.feed(words[:256])
        assert set(stream.occupancy().held) == {256}
        state = stream.save()
        after = stream.predict(words[256:300])
        occupancy = stream.occupancy()
        assert occupancy.positions[0] == tuple(range(128, 300))
        stream.restore(state)
        assert stream.next_token(words[256:300]) == int(after[-1].argmax())
    # keys were computed when the older half could still be seen: not what reading them again would give
    assert np.abs(after[-1] - reference(model, words[128:300])).max() > 0.1


def test_an_evicting_stream_holds_what_its_cells_hold(model, words):
    with open_stream(model, N_CTX, Cache(0.5, rule="uniform")) as stream:
        stream.feed(words[:400])
        stream.pin(10, 20)
        stream.feed(words[400:])
        occupancy = stream.occupancy()
    assert occupancy.held == occupancy.cells and sum(occupancy.cells) == 0.5 * N_CTX * model.n_layers
    for held in occupancy.positions:
        assert set(range(4)) | set(range(N_CTX - 32, N_CTX)) <= set(held)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=20))
def test_log_softmax_sums_to_one(logits):
    assert np.exp(log_softmax(np.float32([logits]))).sum() == pytest.approx(1, abs=1e-5)


# --- records --------------------------------------------------------------------------------------------------------

KEYS = st.text(min_size=1, max_size=5)
RECORDS = st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False) | st.lists(st.integers()), max_size=3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(KEYS, RECORDS), max_size=6), st.integers(0, 400))
def test_a_store_survives_an_interrupt_at_any_byte(tmp_path_factory, written, n_kept):
    path = tmp_path_factory.mktemp("store") / "a.jsonl"
    store = Store(path)
    for key, record in written:
        store[key] = record
    whole = path.read_bytes()
    path.write_bytes(whole[:n_kept])
    lines = [json.loads(line) for line in whole[:n_kept].splitlines(keepends=True) if line.endswith(b"\n")]
    Store(path)["next"] = {"x": 1}
    again = Store(path)
    assert {key: again[key] for key in again} == dict(lines) | {"next": {"x": 1}}


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DepthKVError, match="cannot keep results in .*XDG_CACHE_HOME"):
        Store(tmp_path / "file" / "a.jsonl")
