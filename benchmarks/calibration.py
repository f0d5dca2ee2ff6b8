"""What calibration must hold, from the calibration itself to the pruned engine, in one run.

    .venv/bin/python -m benchmarks.calibration --prose novel.txt

Quality is measured in the engine on F32 weights at context 4096, prefill in bounded memory, on texts that calibration
did not see.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.stats import bootstrap, spearmanr

from benchmarks.f32 import write_f32
from benchmarks.kl import Setting, compare, load_model, tokenize
from benchmarks.passkey import passkey
from benchmarks.texts import held_out
from calibrate.load import find_source
from calibrate.run import Settings, read_corpus
from depthkv_edge import Llama
from depthkv_edge.calibration import Calibration, read_calibration

N_CTX = 4096
BUDGETS = (0.2, 0.4, 0.6)
RULES = ("optimal", "proportional")  # the default first
N_POSITIONS = 20
ABLATION_RATIO = 0.2
CHUNK = 256

Row = dict[str, Any]


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar with the time left on standard error, where that is a terminal."""
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


# --- the calibration itself -----------------------------------------------------------------------------------------


def calibrate(model: str, target: Path, method: str) -> Row:
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


def correlation(exact: Calibration, fast: Calibration) -> Row:
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
) -> Row:
    """Prune one layer at a time in the engine, through explicit cells, on windows that were calibrated on.

    Args:
        measured: [W, L, R] nats per token, by torch on the same windows.
        n_tail: tokens at the end of a window that both score.
    """
    ratio = min(calibration.keep_ratios, key=lambda r: abs(r - ABLATION_RATIO))
    n_layers = len(calibration.layer_ids)
    n_tokens, chunk = len(windows[0]), 128
    kl = np.zeros((len(windows), n_layers))
    settings = {
        str(i): Setting(cells=tuple(round(ratio * n_tokens) if i == j else n_tokens for j in range(n_layers)))
        for i in range(n_layers)
    }
    with load_model(model) as loaded, progress("ablation", len(windows) * (n_tokens // chunk)) as advance:
        for row, window in zip(kl, windows, strict=True):
            found = compare(
                loaded, list(window), settings, n_threads=n_threads, n_scored=n_tail, chunk=chunk, on_chunk=advance
            )
            row[:] = [found[str(i)].to_dict()["kl"] for i in range(n_layers)]
    torch_side = measured[: len(windows), :, calibration.keep_ratios.index(ratio)].mean(axis=0)
    return {
        "figure": f"engine against torch, each layer pruned alone to {ratio:.2g}: Spearman",
        "spearman": float(spearmanr(kl.mean(axis=0), torch_side).statistic),
        "engine": [float(x) for x in kl.mean(axis=0)],
        "torch": [float(x) for x in torch_side],
    }


# --- quality --------------------------------------------------------------------------------------------------------


def cells_of(model: Path, budget: float, rule: str) -> tuple[int, ...]:
    llama = Llama(model, n_ctx=N_CTX, kv_budget=budget, rule=rule, verbose=False)
    cells = tuple(layer.cells for layer in llama.kv_stats().layers)
    llama.close()
    return cells


def settings_of(model: Path, rules: tuple[str, ...]) -> dict[str, Setting]:
    """Uniform and the rules at every budget, uniform at 0.55, and the first rule's cells dealt to other layers."""
    settings = {"uniform 0.55": Setting(0.55, rule="uniform")}
    for budget in BUDGETS:
        for rule in ("uniform", *rules):
            settings[f"{rule} {budget}"] = Setting(budget, rule=rule)
    cells = list(cells_of(model, 0.4, rules[0]))
    random.Random(0).shuffle(cells)
    return settings | {"shuffled 0.4": Setting(cells=tuple(cells))}


def quality(
    model: Path, texts: dict[str, str], settings: dict[str, Setting], n_windows: int, n_threads: int
) -> dict[str, np.ndarray]:
    """Mean KL divergence from the full cache over the second half of every window, [texts, windows] by setting."""
    kl = {name: np.zeros((len(texts), n_windows)) for name in settings}
    with load_model(model) as loaded, progress("quality", len(texts) * n_windows * N_CTX // CHUNK) as advance:
        for i, text in enumerate(texts.values()):
            tokens = tokenize(loaded, text[: 16 * N_CTX * (n_windows + 1)])
            if len(tokens) < n_windows * N_CTX:
                raise ValueError(f"a text has {len(tokens)} tokens, {n_windows} windows need {n_windows * N_CTX}")
            gap = (len(tokens) - N_CTX) // max(1, n_windows - 1)
            for j in range(n_windows):
                window = tokens[j * gap :][:N_CTX]
                found = compare(
                    loaded, window, settings, n_threads=n_threads, n_scored=N_CTX // 2, chunk=CHUNK, on_chunk=advance
                )
                for name, agreement in found.items():
                    kl[name][i, j] = agreement.to_dict()["kl"]
    return kl


def quality_rows(texts: dict[str, str], kl: dict[str, np.ndarray], rules: tuple[str, ...]) -> Iterator[Row]:
    for name, values in kl.items():
        means = {title: float(row.mean()) for title, row in zip(texts, values, strict=True)}
        yield {"figure": f"KL, {name}", **means, "mean": float(values.mean())}
    pairs = [(f"{rule} {b}", f"uniform {b}") for rule in rules for b in BUDGETS]
    pairs += [(f"{rules[0]} 0.4", "uniform 0.55"), ("uniform 0.4", "shuffled 0.4")]
    for ours, other in pairs:
        yield {"figure": f"times less KL, {ours} than {other}", **ratio_row(texts, kl[ours], kl[other])}


def ratio_row(texts: dict[str, str], ours: np.ndarray, other: np.ndarray) -> Row:
    """How many times less KL on each text and in the geometric mean of the texts.

    Beside it the geometric mean over the single windows, with its 95 % interval (bootstrap over the windows).
    """
    by_text = other.mean(axis=1) / ours.mean(axis=1)
    row = {title: float(x) for title, x in zip(texts, by_text, strict=True)}
    row["geometric_mean"] = float(np.exp(np.log(by_text).mean()))
    logs = np.log(other / ours).ravel()
    if logs.size > 2:
        interval = bootstrap((logs,), np.mean, rng=np.random.default_rng(0)).confidence_interval
        row["by_window"] = float(np.exp(logs.mean()))
        row |= {"windows_low": float(np.exp(interval.low)), "windows_high": float(np.exp(interval.high))}
    return row


# --- retrieval ------------------------------------------------------------------------------------------------------


def retrieval(model: Path, haystack: str, rules: tuple[str, ...], n_threads: int) -> Iterator[Row]:
    settings = {"full": Setting()}
    settings |= {f"{rule} 0.4": Setting(0.4, rule=rule) for rule in ("uniform", *rules)}
    with load_model(model) as loaded, progress("passkey", len(settings) * N_POSITIONS) as advance:
        found = passkey(
            loaded,
            haystack,
            settings,
            n_ctx=N_CTX,
            n_positions=N_POSITIONS,
            n_threads=n_threads,
            on_step=advance,
        )
    for name, answers in found.items():
        yield {"figure": f"passkey, {name}", **answers.to_dict()}


def _format(row: Row) -> str:
    values = ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in row.items()
        if k != "figure" and not isinstance(v, list)
    )
    return f"{row['figure']:60} {values}"


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Path of a GGUF, or smollm2.")
@click.option("--prose", type=click.Path(exists=True, path_type=Path), help="A novel: the fourth kind of text.")
@click.option("--directory", default="build/calibration", show_default=True, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(["calibrate", "ablation", "quality", "retrieval"]))
@click.option("--all-rules", is_flag=True, help="Every allocation rule, not just the default one.")
@click.option("--windows", default=2, show_default=True, help="Of each text, for quality.")
@click.option("--ablation-windows", default=2, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures to a file.")
def main(
    model: str,
    prose: Path | None,
    directory: Path,
    only: tuple[str, ...],
    all_rules: bool,
    windows: int,
    ablation_windows: int,
    threads: int,
    json_file: Path | None,
) -> None:
    """Print every figure that calibration promises. The other sections read what the section calibrate leaves."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = held_out(directory, prose)
    rules = RULES if all_rules else RULES[:1]
    files = {method: directory / f"{method}.gguf" for method in ("exact", "fast")}
    f32 = directory / "f32.gguf"

    def measure() -> Iterator[Row]:
        # the cheaper one first: the peak of the children is that of the largest so far
        yield calibrate(model, files["fast"], "fast")
        yield calibrate(model, files["exact"], "exact")
        yield correlation(*(_calibration(files[method]) for method in ("exact", "fast")))

    def f32_model() -> Path:
        if not files["exact"].exists():
            raise click.UsageError(f"{files['exact']} does not exist: run the section calibrate first")
        if not f32.exists() or f32.stat().st_mtime < files["exact"].stat().st_mtime:
            f32.unlink(missing_ok=True)
            write_f32(files["exact"], f32)
        return f32

    def ablate() -> Iterator[Row]:
        settings = Settings(model=model, gguf=None, output=files["exact"])
        read = read_corpus(settings, find_source(model)).windows[:ablation_windows]
        yield ablation(
            f32_model(),
            _calibration(files["exact"]),
            np.array(json.loads(files["exact"].with_suffix(".json").read_text())["per_window"]),
            [window.tokens for window in read],
            settings.tail_tokens("exact"),
            threads,
        )

    sections: dict[str, Callable[[], Iterator[Row]]] = {
        "calibrate": measure,
        "quality": lambda: quality_rows(
            texts, quality(f32_model(), texts, settings_of(f32_model(), rules), windows, threads), rules
        ),
        "retrieval": lambda: retrieval(f32_model(), texts["essays"], rules, threads),
        "ablation": ablate,
    }
    rows: list[Row] = []
    for name, section in sections.items():
        if only and name not in only:
            continue
        for row in section():
            print(_format(row), flush=True)
            rows.append(row)
            if json_file:
                json_file.write_text(json.dumps(rows, indent=1) + "\n")


def _calibration(path: Path) -> Calibration:
    found = read_calibration(path)
    if found is None:
        raise click.UsageError(f"{path} carries no calibration: run the section calibrate first")
    return found


if __name__ == "__main__":
    main()
