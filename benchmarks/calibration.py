"""What calibration itself must hold: its cost, `fast` against `exact`, and torch's curves against the engine's.

    .venv/bin/python -m benchmarks.calibration

What the calibrated budgets are worth is measured by `depthkv-edge eval`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

from depthkv_edge.calibrate.calibrate import read_corpus
from depthkv_edge.calibrate.calibrate_settings import CalibrateSettings
from depthkv_edge.calibrate.load import find_source
from depthkv_edge.engine.model import Cache, load_model
from depthkv_edge.measure.progress import progress
from depthkv_edge.modelfile.f32 import write_f32
from depthkv_edge.modelfile.keys import Calibration, read_calibration
from depthkv_edge.quality.language import run_window
from depthkv_edge.quality.rows import FULL, Row

ABLATION_RATIO = 0.2

Figures = dict[str, Any]


# --- the calibration itself -----------------------------------------------------------------------------------------


def calibrate(model: str, target: Path, method: str) -> Figures:
    """Run the command in a process of its own: seconds of all of it and of the measuring, and its peak memory."""
    command = [sys.executable, "-m", "depthkv_edge", "calibrate", model, "-o", str(target), "--method", method]
    command += ["--curves", str(target.with_suffix(".json"))]
    start = time.perf_counter()
    done = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # the largest child so far
    facts = json.loads(done.stdout)
    return {
        "figure": f"calibrate --method {method}",
        "seconds": seconds,
        "measuring": facts["seconds"][method],
        "peak_mib": peak / 2**20,
        "stability": facts["stability"],
        "gain": facts["held_out"]["gain"],
        "rule": facts["rule"],
    }


def correlation(exact: Calibration, fast: Calibration) -> Figures:
    a, b = exact.sensitivity, fast.sensitivity
    return {
        "figure": "fast against exact: Spearman",
        "curves": float(spearmanr(a.ravel(), b.ravel()).statistic),
        "layers": float(np.mean([spearmanr(a[:, i], b[:, i]).statistic for i in range(a.shape[1])])),
    }


# --- the engine's curves against torch's ----------------------------------------------------------------------------


def ablation(
    model: Path,
    calibration: Calibration,
    measured: np.ndarray,
    windows: list[tuple[int, ...]],
    n_tail: int,
    n_threads: int,
) -> Figures:
    """Prune one layer at a time in the engine, through explicit cells, on windows that were calibrated on.

    Args:
        measured: [W, L, R] nats per token, by torch on the same windows.
        n_tail: tokens at the end of a window that torch scored; the engine's scores of them are compared.
    """
    ratio = min(calibration.keep_ratios, key=lambda r: abs(r - ABLATION_RATIO))
    n_layers = len(calibration.layer_ids)
    n_tokens = len(windows[0])
    kl = np.zeros((len(windows), n_layers))
    rows = [Row(FULL)] + [
        Row(str(i), cache=Cache(cells=tuple(round(ratio * n_tokens) if i == j else n_tokens for j in range(n_layers))))
        for i in range(n_layers)
    ]
    with load_model(model, n_threads) as loaded, progress("ablation", len(windows) * len(rows) * n_tokens) as advance:
        for values, window in zip(kl, windows, strict=True):
            found = run_window(loaded, rows, window, advance)
            values[:] = [np.mean(found[str(i)]["kl"][-n_tail:]) for i in range(n_layers)]
    torch_side = measured[: len(windows), :, calibration.keep_ratios.index(ratio)].mean(axis=0)
    return {
        "figure": f"engine against torch, each layer pruned alone to {ratio:.2g}: Spearman",
        "spearman": float(spearmanr(kl.mean(axis=0), torch_side).statistic),
        "engine": [float(x) for x in kl.mean(axis=0)],
        "torch": [float(x) for x in torch_side],
    }


def _format(figures: Figures) -> str:
    values = ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in figures.items()
        if k != "figure" and not isinstance(v, list)
    )
    return f"{figures['figure']:60} {values}"


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Path of a GGUF, or smollm2.")
@click.option("--directory", default="build/calibration", show_default=True, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(["calibrate", "ablation"]))
@click.option("--ablation-windows", default=2, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures to a file.")
def main(
    model: str,
    directory: Path,
    only: tuple[str, ...],
    ablation_windows: int,
    threads: int,
    json_file: Path | None,
) -> None:
    """Print every figure that calibration promises. The ablation reads what the section calibrate leaves."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {method: directory / f"{method}.gguf" for method in ("exact", "fast")}
    f32 = directory / "f32.gguf"

    def measure() -> Iterator[Figures]:
        # the cheaper one first: the peak of the children is that of the largest so far
        yield calibrate(model, files["fast"], "fast")
        yield calibrate(model, files["exact"], "exact")
        yield correlation(*(_calibration(files[method]) for method in ("exact", "fast")))

    def ablate() -> Iterator[Figures]:
        calibration = _calibration(files["exact"])
        if not f32.exists() or f32.stat().st_mtime < files["exact"].stat().st_mtime:
            f32.unlink(missing_ok=True)
            write_f32(files["exact"], f32)
        settings = CalibrateSettings(model=model, gguf=None, output=files["exact"])
        read = read_corpus(settings, find_source(model)).windows[:ablation_windows]
        yield ablation(
            f32,
            calibration,
            np.array(json.loads(files["exact"].with_suffix(".json").read_text())["per_window"]),
            [window.tokens for window in read],
            settings.tail_tokens("exact"),
            threads,
        )

    sections: dict[str, Callable[[], Iterator[Figures]]] = {"calibrate": measure, "ablation": ablate}
    found: list[Figures] = []
    for name, section in sections.items():
        if only and name not in only:
            continue
        for figures in section():
            print(_format(figures), flush=True)
            found.append(figures)
            if json_file:
                json_file.write_text(json.dumps(found, indent=1) + "\n")


def _calibration(path: Path) -> Calibration:
    found = read_calibration(path)
    if found is None:
        raise click.UsageError(f"{path} carries no calibration: run the section calibrate first")
    return found


if __name__ == "__main__":
    main()
