"""What a file says of its calibration is checked before it is believed: one line that names the key."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType as T
from hypothesis import given, settings
from hypothesis import strategies as st
from support.keys import HOSTILE, N_LAYERS, NAN, example, hostile, write

from depthkv_edge import DepthKVError
from depthkv_edge.engine.rules import ALLOC_RULES, SCORERS
from depthkv_edge.modelfile.keys import KEYS, Calibration, KeyValue, read_budget, read_calibration, to_keys

floats = st.floats(0, 1e6, width=32)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    layers = tuple(sorted(draw(st.sets(st.integers(0, N_LAYERS - 1), min_size=1))))
    grid = draw(st.sets(st.floats(0, 1, width=32, exclude_min=True), min_size=1, max_size=5))
    ratios = tuple(float(str(np.float32(ratio))) for ratio in sorted(grid))
    n = len(ratios)
    curves = [sorted(draw(st.lists(floats, min_size=n, max_size=n)), reverse=True) for _ in layers]
    if ratios[-1] == 1:
        curves = [[*curve[:-1], 0.0] for curve in curves]
    errors = draw(st.lists(floats, min_size=n * len(layers), max_size=n * len(layers)))
    return example(
        layer_ids=layers,
        keep_ratios=ratios,
        sensitivity=np.array(curves, np.float32),
        sensitivity_se=np.array(errors, np.float32).reshape(len(layers), n),
        scorer=draw(st.sampled_from(sorted(SCORERS))),
        rule=draw(st.sampled_from(["", *ALLOC_RULES])),
        model=draw(st.just("") | names),
        sink_tokens=draw(st.integers(1, 2**20)),
        tokens=draw(st.integers(0, 2**32 - 1)),
        stability=draw(st.sampled_from([math.nan, -1.0, 0.5])),
        budget=draw(st.sampled_from([None, 0.001, 0.4, 1.0])),
    )


@settings(deadline=None, max_examples=50)
@given(calibration=calibrations())
def test_round_trip(calibration):
    with tempfile.TemporaryDirectory() as directory:
        found = read_calibration(write(Path(directory) / "m.gguf", to_keys(calibration)))
    assert found is not None
    for attribute in (field.name for field in fields(Calibration)):
        np.testing.assert_array_equal(getattr(found, attribute), getattr(calibration, attribute), attribute)


def test_values_are_32_bit_and_read_as_written(tmp_path):
    found = read_calibration(write(tmp_path / "m.gguf", to_keys(example(budget=0.3))))
    assert found.keep_ratios == (0.2, 0.6) and found.budget == 0.3
    assert found.sensitivity.dtype == found.sensitivity_se.dtype == np.float32


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_keys(tmp_path, name):
    key, _, part = HOSTILE[name]
    with pytest.raises(DepthKVError) as caught:
        read_calibration(write(tmp_path / "m.gguf", hostile(name)))
    message = str(caught.value)
    assert f"depthkv.{key}" in message and part in message and "m.gguf" in message
    assert "\n" not in message


def test_empty_arrays(tmp_path):
    """L = 0, which gguf-py does not write: as in a file made by another hand."""
    for name in ("layer_ids", "keep_ratios"):
        path = write(tmp_path / f"{name}.gguf", to_keys(example()))
        content = bytearray(path.read_bytes())
        start = content.index(f"depthkv.{name}".encode()) + len(f"depthkv.{name}") + 8
        n_items = int.from_bytes(content[start : start + 8], "little")
        content[start : start + 8 + 4 * n_items] = bytes(8)
        path.write_bytes(content)
        with pytest.raises(DepthKVError) as caught:
            read_calibration(path)
        assert "depthkv." in str(caught.value)


def test_budget_of_a_file(tmp_path):
    def read(*key):
        return read_budget(write(tmp_path / "m.gguf", [KeyValue("depthkv.budget", *key)] if key else []))

    assert read() is None and read_calibration(tmp_path / "m.gguf") is None
    assert read(0.3, T.FLOAT32, None) == 0.3 and read_calibration(tmp_path / "m.gguf") is None
    for key in ((1.5, T.FLOAT32, None), (NAN, T.FLOAT32, None), (0.3, T.FLOAT64, None), ("0.3", T.STRING, None)):
        with pytest.raises(DepthKVError, match="m.gguf: key 'depthkv.budget' "):
            read(*key)


def test_rounding_is_forgiven(tmp_path):
    curves = np.array([[0.5, 0.5], [0.125, 0.0], [2.0, 1.0]], np.float32)
    curves[0, 1] = np.nextafter(np.float32(0.5), np.float32(1))
    read_calibration(write(tmp_path / "m.gguf", to_keys(example(sensitivity=curves))))


def test_facts_are_optional(tmp_path):
    required = {key.name for key in KEYS if key.missing is ...}
    found = read_calibration(write(tmp_path / "m.gguf", [key for key in to_keys(example()) if key.name in required]))
    assert found.rule == found.method == found.corpus == "" and found.windows == 0
    assert math.isnan(found.gain) and found.budget is None
    assert {key.name for key in to_keys(found)} >= required


def test_array_that_claims_too_much(tmp_path):
    """A length of 2**60 is refused at once."""
    path = write(tmp_path / "m.gguf", to_keys(example()))
    content = bytearray(path.read_bytes())
    start = content.index(b"depthkv.layer_ids") + len("depthkv.layer_ids") + 8
    content[start : start + 8] = (2**60).to_bytes(8, "little")
    path.write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(DepthKVError, match="damaged or incomplete"):
        read_calibration(path)
    assert time.perf_counter() - started < 1


def test_reading_is_fast(smollm2):
    started = time.perf_counter()
    read_calibration(smollm2)  # 49,152 tokens and as many merges
    assert time.perf_counter() - started < 1
