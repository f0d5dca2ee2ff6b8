"""What a file says of its calibration is checked before it is believed: one line that names the key."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType as T
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from depthkv_edge import DepthKVError
from depthkv_edge.modelfile.keys import KEYS, Calibration, KeyValue, from_keys, read_budget, read_calibration, to_keys

N_LAYERS = 4


def write(path: Path, keys: list[KeyValue]) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(N_LAYERS)
    for key in keys:
        writer.add_key_value(key.name, key.value, key.type, key.item_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def example(**changes: Any) -> Calibration:
    sensitivity = np.array([[0.5, 0.25], [0.125, 0.0], [2.0, 1.0]], np.float32)
    facts: dict[str, Any] = {
        "layer_ids": (0, 1, 3),
        "keep_ratios": (0.2, 0.6),
        "sensitivity": sensitivity,
        "sensitivity_se": sensitivity / 8,
        "scorer": "attention",
        "sink_tokens": 4,
        "recent_tokens": 32,
        "rule": "proportional",
        "model": "m",
        "corpus": "c sha256:00",
        "tokens": 1024,
        "windows": 4,
        "window_tokens": 256,
        "method": "fast",
        "stability": 0.9,
        "gain": 2.0,
        "tool": "depthkv-edge 1",
    }
    return Calibration(**(facts | changes))


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
        scorer=draw(names),
        rule=draw(st.just("") | names),
        model=draw(st.just("") | names),
        sink_tokens=draw(st.integers(1, 2**20)),
        tokens=draw(st.integers(0, 2**32 - 1)),
        stability=draw(st.sampled_from([math.nan, -1.0, 0.5])),
        budget=draw(st.sampled_from([None, 0.001, 0.4, 1.0])),
    )


@settings(deadline=None, max_examples=100)
@given(calibration=calibrations())
def test_round_trip(calibration):
    with tempfile.TemporaryDirectory() as directory:
        found = read_calibration(write(Path(directory) / "m.gguf", to_keys(calibration)))
    assert found is not None
    for attribute in (field.name for field in fields(Calibration)):
        np.testing.assert_array_equal(getattr(found, attribute), getattr(calibration, attribute), attribute)


def test_no_calibration(tmp_path):
    assert read_calibration(write(tmp_path / "m.gguf", [])) is None
    assert read_calibration(write(tmp_path / "b.gguf", [KeyValue("depthkv.budget", 0.5, T.FLOAT32, None)])) is None


def test_values_are_32_bit_and_read_as_written(tmp_path):
    found = read_calibration(write(tmp_path / "m.gguf", to_keys(example(budget=0.3))))
    assert found.keep_ratios == (0.2, 0.6) and found.budget == 0.3
    assert found.sensitivity.dtype == found.sensitivity_se.dtype == np.float32


Edit = Callable[[dict[str, KeyValue]], None]


def put(name: str, value: Any, gguf_type: T | None = None, item_type: T | None = None) -> Edit:
    def edit(keys: dict[str, KeyValue]) -> None:
        old = keys[name]
        keys[name] = KeyValue(name, value, gguf_type or old.type, item_type if gguf_type else old.item_type)

    return edit


def remove(name: str) -> Edit:
    return lambda keys: keys.pop(name) and None


NAN, INF = math.nan, math.inf
CURVES = [0.5, 0.25, 0.125, 0.0, 2.0, 1.0]
HOSTILE: dict[str, tuple[str, Edit, str]] = {
    "version": ("version", put("depthkv.version", 2), "update"),
    "version type": ("version", put("depthkv.version", "1", T.STRING), "'1'"),
    "version array": ("version", put("depthkv.version", [1], T.ARRAY, T.UINT32), "array"),
    "layers missing": ("layer_ids", remove("depthkv.layer_ids"), "missing"),
    "layers duplicate": ("layer_ids", put("depthkv.layer_ids", [0, 1, 1]), "1 follows 1"),
    "layers unsorted": ("layer_ids", put("depthkv.layer_ids", [0, 3, 1]), "1 follows 3"),
    "layers negative": ("layer_ids", put("depthkv.layer_ids", [-1, 0, 1]), "-1 is negative"),
    "layers unknown": ("layer_ids", put("depthkv.layer_ids", [0, 1, 4]), "layer 4 of a model with 4 layers"),
    "layers type": ("layer_ids", put("depthkv.layer_ids", [0, 1, 3], T.ARRAY, T.UINT32), "uint32"),
    "layers scalar": ("layer_ids", put("depthkv.layer_ids", 3, T.INT32), "int32"),
    "layers fewer": ("sensitivity", put("depthkv.layer_ids", [0, 1]), "6 values, not 4"),
    "ratios missing": ("keep_ratios", remove("depthkv.keep_ratios"), "missing"),
    "ratios descending": ("keep_ratios", put("depthkv.keep_ratios", [0.6, 0.2]), "not ascending"),
    "ratios twice": ("keep_ratios", put("depthkv.keep_ratios", [0.2, 0.2]), "not ascending"),
    "ratios 0": ("keep_ratios", put("depthkv.keep_ratios", [0.0, 0.2]), "holds 0.0"),
    "ratios above 1": ("keep_ratios", put("depthkv.keep_ratios", [0.2, 1.5]), "holds 1.5"),
    "ratios nan": ("keep_ratios", put("depthkv.keep_ratios", [0.2, NAN]), "holds nan"),
    "ratios type": ("keep_ratios", put("depthkv.keep_ratios", [0.2, 0.6], T.ARRAY, T.FLOAT64), "float64"),
    "curves short": ("sensitivity", put("depthkv.sensitivity", CURVES[:5]), "5 values, not 6"),
    "curves long": ("sensitivity", put("depthkv.sensitivity", [*CURVES, 0.0]), "7 values, not 6"),
    "curves nan": ("sensitivity", put("depthkv.sensitivity", [NAN, *CURVES[1:]]), "holds nan"),
    "curves inf": ("sensitivity", put("depthkv.sensitivity", [INF, *CURVES[1:]]), "holds inf"),
    "curves negative": ("sensitivity", put("depthkv.sensitivity", [*CURVES[:5], -1.0]), "holds -1.0"),
    "curves rising": ("sensitivity", put("depthkv.sensitivity", [*CURVES[:4], 1.0, 2.0]), "layer 3 (1.0 to 2.0)"),
    "curves full": ("sensitivity", put("depthkv.keep_ratios", [0.2, 1.0]), "is 1.0 at a keep ratio of 1 in layer 3"),
    "curves type": ("sensitivity", put("depthkv.sensitivity", [1] * 6, T.ARRAY, T.INT32), "int32"),
    "curves text": ("sensitivity", put("depthkv.sensitivity", ["x"], T.ARRAY, T.STRING), "string"),
    "error missing": ("sensitivity_se", remove("depthkv.sensitivity_se"), "missing"),
    "error short": ("sensitivity_se", put("depthkv.sensitivity_se", [0.0]), "1 values, not 6"),
    "error nan": ("sensitivity_se", put("depthkv.sensitivity_se", [*CURVES[:5], NAN]), "holds nan"),
    "error negative": ("sensitivity_se", put("depthkv.sensitivity_se", [*CURVES[:5], -1.0]), "holds -1.0"),
    "scorer missing": ("scorer", remove("depthkv.scorer"), "missing"),
    "scorer empty": ("scorer", put("depthkv.scorer", ""), "''"),
    "scorer type": ("scorer", put("depthkv.scorer", 1, T.UINT32), "uint32"),
    "scorer bytes": ("scorer", put("depthkv.scorer", b"\xff"), "UTF-8"),
    "sinks 0": ("sink_tokens", put("depthkv.sink_tokens", 0), "is 0"),
    "recent missing": ("recent_tokens", remove("depthkv.recent_tokens"), "missing"),
    "recent huge": ("recent_tokens", put("depthkv.recent_tokens", 2**31), "2147483648"),
    "rule type": ("rule", put("depthkv.rule", 1, T.UINT32), "uint32"),
    "tokens type": ("calibration.tokens", put("depthkv.calibration.tokens", 1, T.UINT64), "uint64"),
    "gain inf": ("calibration.gain", put("depthkv.calibration.gain", INF), "inf"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_keys(tmp_path, name):
    key, edit, part = HOSTILE[name]
    keys = {entry.name: entry for entry in to_keys(example())}
    edit(keys)
    with pytest.raises(DepthKVError) as caught:
        read_calibration(write(tmp_path / "m.gguf", list(keys.values())))
    message = str(caught.value)
    assert f"key depthkv.{key} " in message and part in message and "m.gguf" in message
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


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.5, math.nan, 1e-50])
def test_budget(budget):
    with pytest.raises(DepthKVError, match="key depthkv.budget is"):
        to_keys(example(budget=budget))


def test_budget_of_a_file(tmp_path):
    def read(*key):
        return read_budget(write(tmp_path / "m.gguf", [KeyValue("depthkv.budget", *key)] if key else []))

    assert read() is None
    assert read(0.3, T.FLOAT32, None) == 0.3
    for key in ((1.5, T.FLOAT32, None), (NAN, T.FLOAT32, None), (0.3, T.FLOAT64, None), ("0.3", T.STRING, None)):
        with pytest.raises(DepthKVError, match="m.gguf: key depthkv.budget is .*at most 1"):
            read(*key)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"layer_ids": ()}, "layer_ids"),
        ({"sensitivity": np.zeros((3, 3), np.float32)}, "sensitivity"),
        ({"sensitivity_se": np.full((3, 2), np.nan, np.float32)}, "sensitivity_se"),
        ({"keep_ratios": (0.2, 0.2 + 1e-12)}, "keep_ratios"),  # the same in 32 bits
        ({"tokens": 2**32}, "calibration.tokens"),
        ({"recent_tokens": -1}, "recent_tokens"),
    ],
)
def test_nonsense_is_not_written(changes, key):
    with pytest.raises(DepthKVError, match=f"key depthkv.{key} "):
        to_keys(example(**changes))


def test_rounding_is_forgiven():
    curves = np.array([[0.5, 0.5], [0.125, 0.0], [2.0, 1.0]], np.float32)
    curves[0, 1] = np.nextafter(np.float32(0.5), np.float32(1))
    to_keys(example(sensitivity=curves))


def test_facts_are_optional():
    required = {key.name for key in KEYS if key.missing is ...}
    values = {key.name: key.value for key in to_keys(example()) if key.name in required}
    found = from_keys(values)
    found.check(N_LAYERS)
    assert found.rule == found.method == found.corpus == "" and found.windows == 0
    assert math.isnan(found.gain) and found.budget is None
    assert {key.name for key in to_keys(replace(found))} >= required


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
