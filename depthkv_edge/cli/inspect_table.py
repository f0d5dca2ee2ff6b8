"""What `inspect` shows on a terminal."""

from __future__ import annotations

import math

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from depthkv_edge.modelfile.keys import CHECK_BUDGET, Calibration
from depthkv_edge.sizing.inspection import Inspection
from depthkv_edge.units import kv_share

_BAR_WIDTH = 12


def print_inspection(inspection: Inspection) -> None:
    """Facts and a table of layers, on standard output."""
    console = Console(highlight=False)
    for name, text in fact_rows(inspection):
        # not a table: a path or a command that is wrapped cannot be copied
        console.print(Text.assemble((f"{name:<13}", "bold"), text), soft_wrap=True)
    console.print()
    console.print(_layer_table(inspection))


def fact_rows(inspection: Inspection) -> list[tuple[str, str]]:
    """Rows above the table of layers: a name, and what is to be said about it."""
    kv = inspection.kv
    rows = [("model", str(inspection.model)), ("context", f"{inspection.n_ctx} tokens")]
    rows += _calibration_rows(inspection)
    if kv.active:
        rows.append(("budget", f"{kv.budget:.3g} of the full cache, shared out by rule {kv.rule}, scorer {kv.scorer}"))
    else:
        rows.append(("budget", "none, the full cache: give one with --kv-budget"))
    share = inspection.cells / max(1, inspection.cells_full)
    rows.append(("KV cells", f"{inspection.cells} of {inspection.cells_full} ({share:.0%})"))
    rows.append(("KV cache", kv_share(kv.bytes, kv.bytes_full)))
    return rows


def _calibration_rows(inspection: Inspection) -> list[tuple[str, str]]:
    calibration = inspection.calibration
    if calibration is None:
        how = f"depthkv-edge calibrate {inspection.model} -o {inspection.model.stem}-depthkv.gguf"
        return [("calibration", f"no calibration: allocation is uniform; to calibrate, run `{how}`")]
    safe = f"{calibration.sink_tokens} sink and {calibration.recent_tokens} recent tokens"
    rows = [("calibration", _origin(calibration))]
    if calibration.corpus:
        rows.append(("corpus", calibration.corpus))
    rows.append(("eviction", f"scorer {calibration.scorer}, {safe}"))
    if quality := _quality(calibration):
        rows.append(("quality", quality))
    return rows


def _origin(calibration: Calibration) -> str:
    # each of these facts may be missing
    method = " ".join(filter(None, [calibration.method, calibration.model and f"on {calibration.model}"]))
    parts = [method, f"by {calibration.tool}" if calibration.tool else ""]
    if calibration.windows:
        of = f" of {calibration.window_tokens} tokens" if calibration.window_tokens else ""
        ask = f" and {calibration.recall_windows} that ask" if calibration.recall_windows else ""
        parts.insert(1, f"{calibration.windows} window{'s' * (calibration.windows > 1)}{ask}{of}")
    return ", ".join(filter(None, parts)) or "the file does not say how"


def _quality(calibration: Calibration) -> str:
    parts = []
    if not math.isnan(calibration.gain):
        at = f"at a budget of {CHECK_BUDGET:g}"
        parts.append(f"held-out KL {calibration.gain:.2g} times lower than uniform {at}")
        if calibration.rule == "uniform":
            parts[-1] = f"no gain over uniform on held-out text {at} ({calibration.gain:.2g}): uniform is used"
    if not math.isnan(calibration.stability):
        parts.append(f"rank correlation between texts {calibration.stability:.2f}")
    return "; ".join(parts)


def _layer_table(inspection: Inspection) -> Table:
    calibration = inspection.calibration
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right")
    if calibration is not None:
        table.add_column(f"KL at {calibration.keep_ratios[0]:.3g}, nats", justify="right", no_wrap=True)
        table.add_column("mean KL", justify="right", no_wrap=True)
    for name in ("keep", "cells", "chosen", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for layer in inspection.kv.layers:
        share = layer.cells / inspection.n_ctx
        chosen = "-" if layer.cells >= inspection.n_ctx else str(inspection.chosen(layer))
        cells = [str(layer.layer), f"{share:.2f}", str(layer.cells), chosen, f"{layer.bytes / 2**20:.2f}"]
        if calibration is not None:
            cells[1:1] = _sensitivity(calibration, inspection.row(layer.layer))
        table.add_row(*cells, Bar(1.0, 0.0, share, width=_BAR_WIDTH))
    return table


def _sensitivity(calibration: Calibration, row: int | None) -> tuple[str, str]:
    if row is None:
        return "-", "-"
    curve, error = calibration.sensitivity[row], calibration.sensitivity_se[row]
    return f"{curve[0]:.5f} ± {error[0]:.5f}", f"{curve.mean():.5f}"
