"""What plots are drawn on: sizes, colours, style, and the two ways out, a PNG and an SVG that is part of a page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from depthkv_edge.errors import DepthKVError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSTALL = "pip install 'depthkv-edge[eval]'"


@dataclass(frozen=True)
class Shape:
    """Room for a plot.

    Attributes:
        width, height, font: in points; a page shows a point as one pixel where it has room. Some plots are as high as
            they need to be.
        titled: the plot says itself what it shows, and of which model.
    """

    width: float
    height: float
    font: float
    titled: bool = False


NARROW, WIDE = Shape(328, 340, 15), Shape(548, 400, 15)  # of a page: across a phone, half across a desktop
FILE, _FILE_DPI = Shape(720, 450, 12, titled=True), 120

# By name: on white, and on a dark page. All but grid and band are read, and have a contrast of at least 4.5 there.
# Those of methods differ for red- and green-blind eyes, too, if only in lightness.
COLOURS = {
    "ink": ("#1c2530", "#e4e9f0"),
    "muted": ("#566172", "#a3aebd"),
    "grid": ("#e2e6ec", "#2c3643"),
    "band": ("#d3dae3", "#374253"),
    "paper": ("#ffffff", "#12171f"),
    "blue": ("#0b5cad", "#6fb5fa"),
    "orange": ("#b54708", "#ff9c66"),
    "green": ("#00734f", "#45cf9f"),
    "pink": ("#85247c", "#ff3dac"),
    "gold": ("#4a3b08", "#f5e15e"),
    "teal": ("#285663", "#1b9bb0"),
    "grey": ("#6f757d", "#b0bddc"),
}


def light(name: str) -> str:
    """A colour on white, which `to_svg` turns into one of the page's."""
    return COLOURS[name][0]


@contextmanager
def style(shape: Shape) -> Iterator[None]:
    """How everything inside is drawn.

    Raises:
        DepthKVError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise DepthKVError(f"cannot draw: matplotlib is not installed; run `{INSTALL}`") from None
    settings = {
        "font.size": shape.font,
        "text.parse_math": False,  # a name may hold any character
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.edgecolor": light("muted"),
        "axes.labelcolor": light("muted"),
        "grid.color": light("grid"),
        "text.color": light("ink"),
        "svg.fonttype": "none",
        "svg.hashsalt": "depthkv",  # the same report gives the same page
    }
    settings |= {f"{axis}tick.color": light("muted") for axis in "xy"}
    settings |= {name: shape.font for name in ("axes.titlesize", "axes.labelsize", "legend.fontsize")}
    settings |= {f"{axis}tick.labelsize": shape.font for axis in "xy"}
    with rc_context(settings):
        yield


def new_figure(shape: Shape, height: float) -> Figure:
    """A figure whose pixels are points, so that places can be computed before it is saved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(shape.width / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Raises DepthKVError when the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            figure.savefig(file, format="png", dpi=_FILE_DPI, facecolor=light("paper"))
    except OSError as error:
        raise DepthKVError(f"cannot write {path}: {error.strerror}; choose another directory") from error


def to_svg(figure: Figure, prefix: str) -> str:
    """An SVG element for a page, in its font, with custom properties named after COLOURS, as wide as its container.

    Args:
        prefix: of the ids in it; no two elements of a page may share one.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # addresses of vocabularies, and rules that would hold for the whole page
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    width, height = (72 * size for size in figure.get_size_inches())
    svg = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg).replace("xlink:href", "href")
    for name, (colour, _) in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
