"""Calibrations, files that carry them, and every way in which their keys can be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType as T
from gguf import GGUFWriter

from depthkv_edge.modelfile.keys import Calibration, KeyValue, to_keys

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
    "version type": ("version", put("depthkv.version", "1", T.STRING), "'depthkv.version' must be of type u32"),
    "version array": ("version", put("depthkv.version", [1], T.ARRAY, T.UINT32), "must be of type u32"),
    "layers missing": ("layer_ids", remove("depthkv.layer_ids"), "missing"),
    "layers duplicate": ("layer_ids", put("depthkv.layer_ids", [0, 1, 1]), "names layer 1 after layer 1"),
    "layers unsorted": ("layer_ids", put("depthkv.layer_ids", [0, 3, 1]), "names layer 1 after layer 3"),
    "layers negative": ("layer_ids", put("depthkv.layer_ids", [-1, 0, 1]), "names layer -1"),
    "layers unknown": ("layer_ids", put("depthkv.layer_ids", [0, 1, 4]), "names layer 4: the model has 4"),
    "layers type": ("layer_ids", put("depthkv.layer_ids", [0, 1, 3], T.ARRAY, T.UINT32), "must be an array"),
    "layers scalar": ("layer_ids", put("depthkv.layer_ids", 3, T.INT32), "must be an array"),
    "layers fewer": ("sensitivity", put("depthkv.layer_ids", [0, 1]), "2 layers and 2 keep ratios need 4"),
    "ratios missing": ("keep_ratios", remove("depthkv.keep_ratios"), "missing"),
    "ratios descending": ("keep_ratios", put("depthkv.keep_ratios", [0.6, 0.2]), "must ascend"),
    "ratios twice": ("keep_ratios", put("depthkv.keep_ratios", [0.2, 0.2]), "must ascend"),
    "ratios 0": ("keep_ratios", put("depthkv.keep_ratios", [0.0, 0.2]), "is 0:"),
    "ratios above 1": ("keep_ratios", put("depthkv.keep_ratios", [0.2, 1.5]), "is 1.5:"),
    "ratios nan": ("keep_ratios", put("depthkv.keep_ratios", [0.2, NAN]), "is nan"),
    "ratios type": ("keep_ratios", put("depthkv.keep_ratios", [0.2, 0.6], T.ARRAY, T.FLOAT64), "must be an array"),
    "curves short": ("sensitivity", put("depthkv.sensitivity", CURVES[:5]), "has 5 values"),
    "curves long": ("sensitivity", put("depthkv.sensitivity", [*CURVES, 0.0]), "has 7 values"),
    "curves nan": ("sensitivity", put("depthkv.sensitivity", [NAN, *CURVES[1:]]), "is nan"),
    "curves inf": ("sensitivity", put("depthkv.sensitivity", [INF, *CURVES[1:]]), "is inf"),
    "curves negative": ("sensitivity", put("depthkv.sensitivity", [*CURVES[:5], -1.0]), "is -1:"),
    "curves rising": ("sensitivity", put("depthkv.sensitivity", [*CURVES[:4], 1.0, 2.0]), "the one before it 1"),
    "curves full": ("sensitivity", put("depthkv.keep_ratios", [0.2, 1.0]), "the loss at a keep ratio of 1 is 0"),
    "curves type": ("sensitivity", put("depthkv.sensitivity", [1] * 6, T.ARRAY, T.INT32), "must be an array"),
    "curves text": ("sensitivity", put("depthkv.sensitivity", ["x"], T.ARRAY, T.STRING), "must be an array"),
    "error missing": ("sensitivity_se", remove("depthkv.sensitivity_se"), "missing"),
    "error short": ("sensitivity_se", put("depthkv.sensitivity_se", [0.0]), "has 1 values"),
    "error nan": ("sensitivity_se", put("depthkv.sensitivity_se", [*CURVES[:5], NAN]), "is nan"),
    "error negative": ("sensitivity_se", put("depthkv.sensitivity_se", [*CURVES[:5], -1.0]), "is -1"),
    "scorer missing": ("scorer", remove("depthkv.scorer"), "missing"),
    "scorer empty": ("scorer", put("depthkv.scorer", ""), "must be one of attention"),
    "scorer type": ("scorer", put("depthkv.scorer", 1, T.UINT32), "must be one of attention"),
    "scorer bytes": ("scorer", put("depthkv.scorer", b"\xff"), "must be one of attention"),
    "sinks 0": ("sink_tokens", put("depthkv.sink_tokens", 0), "0 sink tokens"),
    "recent missing": ("recent_tokens", remove("depthkv.recent_tokens"), "missing"),
    "recent huge": ("recent_tokens", put("depthkv.recent_tokens", 2**31), "2147483648 recent tokens"),
    "rule type": ("rule", put("depthkv.rule", 1, T.UINT32), "must be of type string"),
    "tokens type": ("calibration.tokens", put("depthkv.calibration.tokens", 1, T.UINT64), "uint64"),
}


def make_calibration(n_layers: int = 2, **changes: Any) -> Calibration:
    ratios = (0.2, 0.4, 0.6)
    curves = np.outer(np.arange(1, n_layers + 1), [0.3, 0.1, 0.01]).astype(np.float32)
    calibration = Calibration(
        layer_ids=tuple(range(n_layers)),
        keep_ratios=ratios,
        sensitivity=curves,
        sensitivity_se=curves / 10,
        scorer="attention",
        sink_tokens=4,
        recent_tokens=32,
        rule="optimal",
        model="some/model",
        corpus="reference sha256:" + "0" * 64,
        tokens=8192,
        windows=4,
        window_tokens=2048,
        method="exact",
        stability=0.875,
        gain=3.5,
        tool="depthkv-edge 0",
    )
    return replace(calibration, **changes)


def hostile(name: str) -> list[KeyValue]:
    """The keys of a calibration with one fault."""
    keys = {entry.name: entry for entry in to_keys(example())}
    HOSTILE[name][1](keys)
    return list(keys.values())
