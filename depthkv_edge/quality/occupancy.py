"""Heat maps of the tokens that each layer holds, of two methods side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from depthkv_edge.quality.canvas import Shape, light, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = dict[str, Any]
Row = dict[str, Any]

TITLE = "Tokens that each layer holds"
CAPTION = (
    "Share of the tokens at each place of the text that a layer still holds at the end of the first window: a row of "
    "pixels is a layer, the first token on the left, the latest on the right."
)
_PANEL = 150.0  # points, the height of one
_COLOURS = "viridis"


def panels(report: Report) -> list[list[Row]]:
    """Rows of the report by budget, and then by method: depth and uniform, or the first two that there are."""
    rows = [row for row in report["rows"] if row["budget"] is not None and row["kv"].get("layers")]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    methods.sort(key=lambda method: ("depth", "uniform").index(method) if method in ("depth", "uniform") else 2)
    by_budget = {budget: [] for budget in sorted({row["budget"] for row in rows})}
    for method in methods[:2]:
        for row in rows:
            if row["method"] == method:
                by_budget[row["budget"]].append(row)
    return [found for found in by_budget.values() if found]


def draw_occupancy(grid: list[list[Row]], shape: Shape, title: str) -> Figure:
    """One panel for each row, one colour scale for all.

    Args:
        grid: see `panels`.
        title: of the figure, "" for none.
    """
    font = shape.font
    columns = max(map(len, grid))
    left, right, gap = 3.9 * font, 1.2 * font, 1.2 * font
    above, below = 2.6 * font if title else 0, 8.2 * font
    step = _PANEL + 2.1 * font
    height = above + len(grid) * step + below
    width = (shape.width - left - right - (columns - 1) * gap) / columns
    figure = new_figure(shape, height)
    if title:
        figure.text(6 / shape.width, 1 - 0.7 * font / height, title, fontsize=1.15 * font, va="top")

    def add(x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / shape.width, y / height, w / shape.width, h / height))

    for i, rows in enumerate(grid):
        for j, row in enumerate(rows):
            axes = add(left + j * (width + gap), below + (len(grid) - 1 - i) * step, width, _PANEL)
            image = _draw_panel(axes, row, first=j == 0, last=i == len(grid) - 1)
    _draw_scale(figure, add(left, 1.9 * font, shape.width - left - right, 0.8 * font), image)
    figure.text(
        (left + shape.width - right) / 2 / shape.width,
        (below - 2.9 * font) / height,
        "position in the text, tokens",
        ha="center",
        va="bottom",
        color=light("muted"),
    )
    return figure


def _draw_panel(axes: Axes, row: Row, *, first: bool, last: bool) -> Any:
    layers, seen = row["kv"]["layers"], row["kv"]["tokens_seen"]
    shares = np.array([layer["occupancy"] for layer in layers], float)
    extent = (0, max(1, seen), len(layers) - 0.5, -0.5)
    image = axes.imshow(shares, cmap=_COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="none", extent=extent)
    axes.set_title(row["label"], loc="left", pad=5)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([0, seen] if last else [], ["0", str(seen)] if last else [])
    for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=False):
        label.set_horizontalalignment(side)
    step = max(1, -(-len(layers) // 4))
    shown = range(0, len(layers), step) if first else []
    axes.set_yticks(shown, [str(layers[i]["layer"]) for i in shown])
    axes.tick_params(length=3)
    if first:
        axes.set_ylabel("layer", labelpad=2)
    return image


def _draw_scale(figure: Figure, axes: Axes, image: Any) -> None:
    figure.colorbar(image, cax=axes, orientation="horizontal", ticks=[0, 0.5, 1])
    axes.set_xticklabels(["none", "half", "all"])
    for label, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
        label.set_horizontalalignment(side)
    axes.set_title("tokens held", loc="left", pad=4, color=light("muted"))
    axes.tick_params(length=3)
    axes.spines[:].set_visible(False)
