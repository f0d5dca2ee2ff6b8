"""One picture of a model's layers: how sensitive each is, and the KV cells it gets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from depthkv_edge.errors import DepthKVError
from depthkv_edge.sizing.inspection import Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INSTALL = "pip install 'depthkv-edge[plot]'"
_FORMATS = ("png", "svg", "pdf")
_SIZE, _DPI = (12.0, 5.0), 100  # inches, and pixels per inch of a PNG

_MARGINS = {"left": 0.065, "right": 0.985, "top": 0.86, "bottom": 0.21, "wspace": 0.17}
_DECADES = 5  # of sensitivity shown below the largest: less is measurement noise

_CELLS, _UNIFORM, _FULL = "#3b6fb6", "#c2410c", "#9ca3af"
_STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
}


def plot_inspection(inspection: Inspection, path: Path) -> None:
    """Draw sensitivity over layers for every keep ratio, and cells over layers, side by side.

    Args:
        path: what is written; its suffix gives the format: png, svg or pdf.

    Raises:
        DepthKVError: matplotlib is missing, the format is not known, or the file cannot be written.
    """
    image_format = path.suffix.removeprefix(".").lower() or "png"
    if image_format not in _FORMATS:
        raise DepthKVError(f"cannot draw {path}: the format is not known, give .png, .svg or .pdf")
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DepthKVError(f"cannot draw {path}: matplotlib is not installed; run `{_INSTALL}`") from None
    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, dpi=_DPI)
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, gridspec_kw=_MARGINS)
        _draw_sensitivity(left, inspection)
        _draw_cells(right, inspection)
        figure.suptitle(_title(inspection), fontsize=13, x=_MARGINS["left"], y=0.97, ha="left")
        try:
            with path.open("wb") as file:
                figure.savefig(file, format=image_format)
        except OSError as error:
            raise DepthKVError(f"cannot write {path}: {error.strerror}; choose another path") from error


def _title(inspection: Inspection) -> str:
    kv = inspection.kv
    share = f"{kv.bytes / 2**20:.0f} of {kv.bytes_full / 2**20:.0f} MiB"
    return f"{inspection.model.name}: KV cache at context {inspection.n_ctx}, {share}"


def _draw_sensitivity(axes: Axes, inspection: Inspection) -> None:
    axes.set_title("Cost of pruning one layer alone", loc="left", fontsize=11)
    axes.set_xlabel("layer")
    axes.set_ylabel("KL divergence, nats per token")
    calibration = inspection.calibration
    if calibration is None:
        axes.text(0.5, 0.5, "no calibration in this file", transform=axes.transAxes, ha="center", color="#6b7280")
        axes.set(yticks=[], ylabel="")
        _layer_axis(axes, [layer.layer for layer in inspection.kv.layers])
        return
    from matplotlib import colormaps

    curves, errors = calibration.sensitivity.astype(float), calibration.sensitivity_se.astype(float)
    peak = float(curves.max()) or 1.0
    floor = peak / 10 ** (2 * _DECADES)  # a log scale has no zero: it lies far below the panel
    colours = colormaps["viridis"](np.linspace(0.0, 0.8, len(calibration.keep_ratios)))
    for column, ratio in enumerate(calibration.keep_ratios):
        curve, error = np.maximum(curves[:, column], floor), errors[:, column]
        style: dict[str, Any] = {"color": colours[column], "zorder": 3}
        axes.plot(calibration.layer_ids, curve, marker="o", ms=4, lw=1.4, label=f"{ratio:.3g}", **style)
        low, high = np.maximum(curve - error, floor), curve + error
        axes.fill_between(calibration.layer_ids, low, high, color=colours[column], alpha=0.2, lw=0)
    axes.set_yscale("log")
    shown = curves[curves > peak / 10**_DECADES]
    axes.set_ylim((shown.min() if shown.size else floor) / 2, peak * 2)
    _legend(axes, "keep ratio")
    _layer_axis(axes, calibration.layer_ids)


def _draw_cells(axes: Axes, inspection: Inspection) -> None:
    kv = inspection.kv
    layers = [layer.layer for layer in kv.layers]
    rule = f"budget {kv.budget:.3g}, rule {kv.rule}" if kv.active else "full cache, no budget"
    axes.set_title(f"KV cells of each layer ({rule})", loc="left", fontsize=11)
    axes.set_xlabel("layer")
    axes.set_ylabel("cells")
    axes.bar(layers, [layer.cells for layer in kv.layers], width=0.8, color=_CELLS)
    axes.axhline(inspection.n_ctx, color=_FULL, lw=1.4, ls=":", label=f"full cache, {inspection.n_ctx} each")
    if kv.active:
        uniform = inspection.cells / len(layers)
        axes.axhline(uniform, color=_UNIFORM, lw=1.6, ls="--", label=f"uniform, {uniform:.0f} each")
    axes.set_ylim(0, inspection.n_ctx * 1.02)
    _legend(axes)
    _layer_axis(axes, layers)


def _legend(axes: Axes, heading: str = "") -> None:
    # one row below the panel, never over the data
    handles, labels = axes.get_legend_handles_labels()
    if heading:
        handles, labels = [axes.plot([], [], lw=0)[0], *handles], [heading, *labels]
    legend = axes.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0, -0.16),
        ncols=len(labels),
        frameon=False,
        borderaxespad=0,
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1.2,
    )
    if heading:
        legend.get_texts()[0].set_x(-26)


def _layer_axis(axes: Axes, layers: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(min(layers) - 0.7, max(layers) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
