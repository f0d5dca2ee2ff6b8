"""A calibrated model in the engine: layers get what their sensitivity asks for, and that is worth something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from support.keys import make_calibration
from support.tiny import write_llama

from depthkv_edge import DepthKVError
from depthkv_edge.engine.context import Options, load_without_weights, plan_context
from depthkv_edge.engine.model import load_model
from depthkv_edge.engine.stats import KVStats
from depthkv_edge.modelfile.f32 import write_f32
from depthkv_edge.modelfile.keys import to_keys
from depthkv_edge.quality.language import run_window
from depthkv_edge.quality.rows import build_rows

N_CTX = 3072  # 96 steps of 32 cells in each layer
RATIOS = (0.1, 0.2, 0.4, 0.7)
ONE, FOUR, NONE = [0.1] * 4, [0.4] * 4, [0.0] * 4


def write(path: Path, curves: Sequence[Sequence[float]], **facts: Any) -> Path:
    """A model of two layers whose file carries these losses."""
    loss = np.array(curves, np.float32)
    measured = {"keep_ratios": RATIOS, "sensitivity": loss, "sensitivity_se": loss}
    calibration = make_calibration(len(loss), **({"rule": ""} | measured | facts))

    def extra(writer: GGUFWriter) -> None:
        for key in to_keys(calibration):
            writer.add_key_value(*key)

    return write_llama(path, extra)


def planned(path: Path, budget: str | None, rule: str | None = None) -> KVStats:
    with load_without_weights(path) as model:
        return plan_context(model, Options(n_ctx=N_CTX, budget=budget, rule=rule)).kv


@pytest.mark.parametrize(
    ("rule", "curves", "budget", "cells"),
    [
        # 57 of 192 steps: the odd one is the first layer's
        ("uniform", [ONE, FOUR], "0.3", [29 * 32, 28 * 32]),
        # four times the sensitivity, twice the cells; what does not fit into a full layer goes to the other
        ("proportional", [ONE, FOUR], "0.3", [19 * 32, 38 * 32]),
        ("proportional", [ONE, FOUR], "0.9", [76 * 32, N_CTX]),
        # 4 sinks, 32 recent tokens and the smallest ubatch take 3 steps
        ("proportional", [NONE, FOUR], "0.3", [3 * 32, 54 * 32]),
        # 105 of 192 steps: who loses keeps everything, who does not gives; what nobody gains from is shared
        ("optimal", [[1e-6, 0, 0, 0], [2, 1, 0.5, 0.3]], "0.55", [9 * 32, N_CTX]),
        ("optimal", [NONE, NONE], "0.5", [N_CTX // 2, N_CTX // 2]),
    ],
)
def test_cells_follow_the_curves(tmp_path, rule, curves, budget, cells):
    path = write(tmp_path / "m.gguf", curves)
    kv = planned(path, budget, rule)
    assert [layer.cells for layer in kv.layers] == cells
    assert (kv.rule, kv.calibrated, kv.n_ctx_seq) == (rule, "attention", N_CTX)
    if rule == "optimal":
        assert planned(path, budget).layers == kv.layers, "the engine's own choice"


def test_what_the_file_asks_for(tmp_path):
    path = write(tmp_path / "m.gguf", [ONE, FOUR], rule="uniform", budget=0.5)
    kv = planned(path, None)
    assert (kv.rule, kv.budget, kv.calibrated) == ("uniform", 0.5, "attention")
    assert planned(path, None, "optimal").rule == "optimal"
    assert not planned(write(path, [ONE, FOUR]), None).active, "without a budget it is the stock cache"


def test_a_layer_without_curve_is_an_error_not_uniform(tmp_path):
    path = write(tmp_path / "m.gguf", [ONE])
    with pytest.raises(DepthKVError, match="depthkv.layer_ids' lacks layer 1"):
        planned(path, "0.5")
    assert not planned(path, None).active


def test_better_than_uniform_and_only_in_the_right_layers(calibrated, text, tmp_path):
    """Controls: capacities dealt to other layers are worse than equal ones, random tokens worse than scored ones."""
    f32 = tmp_path / "f32.gguf"
    write_f32(calibrated, f32)
    n_ctx, budget = 2048, 0.3
    with load_model(f32, n_threads=2) as loaded:
        tokens = (loaded.bos + loaded.tokenize(text[: 8 * n_ctx]))[:n_ctx]
        rows = build_rows(loaded, f32, ["depth", "uniform", "shuffled", "random"], [budget], n_ctx, seed=0)
        found = run_window(loaded, rows, tokens)
    kl = {row.method: np.mean(found[row.label]["kl"]) for row in rows}
    assert 0 < 1.5 * kl["depth"] < kl["uniform"] < min(kl["shuffled"], kl["random"]), kl
    assert kl["full"] == 0 and kl["noise"] < 0.05 * kl["depth"]
