"""A calibrated calibrated in the engine: layers get what their sensitivity asks for, and that is worth something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from depthkv_edge import DepthKVError, Llama
from depthkv_edge.engine import capi
from depthkv_edge.engine.rules import ALLOC_RULES
from depthkv_edge.modelfile.writer import write_calibrated
from depthkv_edge.quality.f32 import write_f32
from depthkv_edge.quality.language import run_window
from depthkv_edge.quality.model import load_model
from depthkv_edge.quality.rows import build_rows

N_LAYERS, ALIGN, FLOOR = 30, 32, 4 + 32 + 32  # sinks, recent tokens, the smallest ubatch


def stats_of(path: Path, **options):
    llama = Llama(path, n_ctx=options.pop("n_ctx", 4096), verbose=False, **options)
    stats = llama.kv_stats()
    llama.close()
    return stats


@pytest.mark.parametrize("rule", [None, *ALLOC_RULES])
@pytest.mark.parametrize("budget", [0.2, 0.4, 0.6])
def test_cells_follow_the_curves(calibrated, calibration, rule, budget):
    stats = stats_of(calibrated, kv_budget=budget, rule=rule)
    expected = capi.alloc(
        float(np.float32(budget)),
        N_LAYERS,
        4096,
        rule=rule,
        keep_ratios=calibration.keep_ratios,
        sensitivity=calibration.sensitivity,
        n_floor=FLOOR,
        n_align=ALIGN,
    )
    assert [layer.cells for layer in stats.layers] == expected
    assert stats.bytes <= budget * stats.bytes_full * (1 + 1e-6)
    assert stats.calibrated == "attention"
    assert stats.rule == (rule or DEFAULT_RULE)
    assert (len(set(expected)) > 2) == (stats.rule != "uniform")


DEFAULT_RULE = "optimal"


def test_without_a_budget_it_is_the_stock_cache(calibrated):
    assert not stats_of(calibrated, n_ctx=512).active


def test_rule_of_the_file(smollm2, calibration, tmp_path):
    path = tmp_path / "m.gguf"
    write_calibrated(smollm2, path, replace(calibration, rule="uniform", budget=0.5))
    stats = stats_of(path, n_ctx=1024)
    assert (stats.rule, stats.budget, stats.calibrated) == ("uniform", 0.5, "attention")
    assert stats_of(path, n_ctx=1024, rule="optimal").rule == "optimal"


def test_a_layer_without_curve_is_an_error_not_uniform(smollm2, calibration, tmp_path):
    path = tmp_path / "m.gguf"
    fewer = replace(
        calibration,
        layer_ids=tuple(range(N_LAYERS - 1)),
        sensitivity=calibration.sensitivity[:-1],
        sensitivity_se=calibration.sensitivity_se[:-1],
    )
    write_calibrated(smollm2, path, fewer)
    with pytest.raises(DepthKVError, match="depthkv.layer_ids' lacks layer 29"):
        Llama(path, n_ctx=1024, kv_budget=0.5, verbose=False)
    assert not stats_of(path, n_ctx=1024).active


def test_run_says_how_layers_are_sized(cli, calibrated, smollm2):
    run = ("-p", "Name a colour.", "-n", 2, "-c", 2048, "--kv-budget", 0.5)
    assert f"by calibrated sensitivity ({DEFAULT_RULE})" in " ".join(cli("run", calibrated, *run).err.split())
    assert "the allocation rule is uniform" in cli("run", calibrated, *run, "--rule", "uniform").err
    assert "the calibrated file carries no calibration" in cli("run", "smollm2", *run).err
    other = " ".join(cli("run", calibrated, *run, "--scorer", "streaming").err.split())
    assert "calibrated with scorer attention, not streaming" in other
    refused = cli("run", "smollm2", *run, "--rule", "optimal")
    assert refused.code == 2 and "calibrate the calibrated or use uniform" in refused.err


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
