"""The plots of a report, as files and for its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthkv_edge.quality import occupancy
from depthkv_edge.quality.canvas import FILE, Shape, save_png, style, to_svg
from depthkv_edge.quality.pareto import QUANTITIES, draw_pareto, pareto

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """One plot of a report.

    Attributes:
        name: of its file, without a suffix.
        title: what it shows.
        caption: how it is read.
        heading: title of a file, which says of what model, too.
    """

    name: str
    title: str
    caption: str
    heading: str
    _draw: Callable[[Shape, str], Figure]

    def draw(self, shape: Shape) -> Figure:
        """Raises DepthKVError when matplotlib is missing."""
        with style(shape):
            return self._draw(shape, self.heading if shape.titled else "")

    def svg(self, shape: Shape) -> str:
        """An SVG element for a page: see `depthkv_edge.quality.canvas.to_svg`. Two shapes may be on one page."""
        with style(shape):
            return to_svg(self.draw(shape), f"{self.name}-{shape.width:g}")


def plots_of(report: Report) -> list[Plot]:
    """The plots that a report (see `depthkv_edge.quality.report.Report.to_dict`) has numbers for."""
    of = f"{report['model']['name']}, context {report['settings']['n_ctx']}"
    plots = []
    for quantity in QUANTITIES:
        if found := pareto(report, quantity):
            title, caption = quantity.title, quantity.caption + found.notes
            plots.append(Plot(quantity.metric, title, caption, f"{title}: {of}", partial(draw_pareto, found)))
    if grid := occupancy.panels(report):
        title = occupancy.TITLE
        draw = partial(occupancy.draw_occupancy, grid)
        plots.append(Plot("occupancy", title, occupancy.CAPTION, f"{title}: {of}", draw))
    return plots


def draw_plots(report: Report, directory: Path) -> list[Path]:
    """Write every plot as a PNG 1200 pixels wide, named after what it shows.

    Args:
        directory: is made if it does not exist.

    Raises:
        DepthKVError: matplotlib is missing, or a file cannot be written.
    """
    paths = []
    for plot in plots_of(report):
        paths.append(directory / f"{plot.name}.png")
        with style(FILE):
            save_png(plot.draw(FILE), paths[-1])
    return paths
