"""One number of every row against its KV bytes: a line for each method, a marker for a stock type of K and V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from depthkv_edge.quality.canvas import Shape, light, new_figure
from depthkv_edge.quality.labels import Label, outline, place_labels
from depthkv_edge.quality.typeset import is_number, plain, small

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

Report = dict[str, Any]

_MARKS = {  # colour and marker; no two methods share both
    "depth": ("blue", "o"),
    "uniform": ("orange", "s"),
    "streaming": ("green", "^"),
    "window": ("pink", "D"),
    "truncate": ("gold", "v"),
    "context-shift": ("teal", "P"),
    "kv-q8_0": ("ink", "*"),
    "kv-q4_0": ("ink", "X"),
    "shuffled": ("grey", "<"),
    "random": ("grey", ">"),
}
_OTHER_MARK = ("ink", "d")
_DECADES = 5  # below the largest value; what is lower lies on the lower edge
_MOST_NAMES = 7  # beside lines: of more, it is hard to see which line each belongs to
_TICK_GAP = 6.0  # points between an axis and its labels, and from the edge of the figure


@dataclass(frozen=True)
class Quantity:
    """A number that rows have.

    Attributes:
        metric, value: where it is in a row.
        title, unit, caption: what is said about it.
        log: decades on the axis. The full cache has 0 then, and the noise row shows what means nothing.
    """

    metric: str
    value: str
    title: str
    unit: str
    caption: str
    log: bool = False


QUANTITIES = (
    Quantity(
        "kl",
        "mean",
        "KL divergence against KV bytes",
        "nats per token; lower is better",
        "Mean KL divergence of the predictions from those of the full cache, which itself has 0. Bars: 95 % interval.",
        log=True,
    ),
    Quantity(
        "decode",
        "ratio",
        "Decode speed against KV bytes",
        "times the full cache's; higher is better",
        "Tokens per second at the end of the context, against the full cache. Bars: range over the windows.",
    ),
    Quantity(
        "passkey",
        "log_prob",
        "Passkey against KV bytes",
        "log-probability, nats; higher is better",
        "Log-probability of the whole right answer: a number hidden in the context, asked for after it. "
        "Bars: 95 % interval.",
    ),
    Quantity(
        "multikey",
        "log_prob",
        "Multi-key retrieval against KV bytes",
        "log-probability, nats; higher is better",
        "Log-probability of the whole right answer: one of several hidden numbers, asked for after the context. "
        "Bars: 95 % interval.",
    ),
)


@dataclass(frozen=True)
class _Series:
    """One method, in ascending order of bytes.

    Attributes:
        shares: of the full cache's bytes.
        values, lows, highs: of the quantity.
    """

    method: str
    shares: np.ndarray
    values: np.ndarray
    lows: np.ndarray
    highs: np.ndarray

    @property
    def colour(self) -> str:
        return light(self._mark[0])

    @property
    def marker(self) -> str:
        return self._mark[1]

    @property
    def _mark(self) -> tuple[str, str]:
        return _MARKS.get(self.method.split("+")[0], _OTHER_MARK)


@dataclass(frozen=True)
class _Reference:
    """A line across the panel, in a band."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Pareto:
    """All that one plot shows.

    Attributes:
        series: of the methods, in the order of the report.
        full, noise: value, low and high of the two rows that are no method; None where there is none.
        bytes_full: of the full cache.
    """

    quantity: Quantity
    series: tuple[_Series, ...]
    full: tuple[float, float, float] | None
    noise: tuple[float, float, float] | None
    bytes_full: int

    @property
    def limits(self) -> tuple[float, float]:
        """Of the y axis."""
        values = np.concatenate([one.values for one in self.series])
        bounds = np.concatenate([np.ravel((one.lows, one.values, one.highs)) for one in self.series])
        if not self.quantity.log:
            bounds = np.append(bounds, self.full[:1] if self.full else [])
            margin = 0.12 * np.ptp(bounds) or 0.1 * abs(bounds[0]) or 1.0
            return float(bounds.min() - margin), float(bounds.max() + margin)
        highest = float(max(bounds.max(), *(self.noise or (0, 0))))
        if highest <= 0:
            return 1e-6, 1e-3
        lowest = max(values[values > 0].min(initial=highest), highest / 10**_DECADES)
        if self.noise and self.noise[0] > lowest / 30:  # a lower one would take up most of the panel
            lowest = min(lowest, self.noise[0])
        margin = (highest / lowest) ** 0.12 * 1.3
        return lowest / margin, highest * margin

    @property
    def notes(self) -> str:
        """What the line across the panel is, and what is not drawn where it belongs."""
        if not self.quantity.log:
            return f" Dashed: the {self.reference.name}." if self.reference else ""
        found = ""
        if self.reference:
            found += " Band: the noise floor, what a change that should not matter costs."
        elif self.noise:
            found += f" The noise floor, {small(self.noise[0])}, lies below the panel."
        if any((one.values < self.limits[0]).any() for one in self.series):
            found += f" What is below {small(self.limits[0])} is drawn on the lower edge."
        return found

    @property
    def reference(self) -> _Reference | None:
        """What to compare with: the noise floor where the full cache has 0, else the full cache."""
        if not self.quantity.log:
            return None if self.full is None else _Reference("full cache", *(3 * self.full[:1]))
        if self.noise is None or self.noise[0] <= self.limits[0]:
            return None
        value, low, high = self.noise
        return _Reference("noise floor", value, max(low, self.limits[0]), high)


def pareto(report: Report, quantity: Quantity) -> Pareto | None:
    """None if no method has the number."""
    points: dict[str, list[tuple[float, ...]]] = {}
    full, noise, *rows = report["rows"]
    for row in rows:
        if value := _value(row, quantity):
            points.setdefault(row["method"], []).append((row["kv"]["share"], *value))
    if not points:
        return None
    series = tuple(_Series(method, *np.array(sorted(found)).T) for method, found in points.items())
    return Pareto(quantity, series, _value(full, quantity), _value(noise, quantity), full["kv"]["bytes_full"])


def _value(row: dict[str, Any], quantity: Quantity) -> tuple[float, float, float] | None:
    """Value, low and high; the bounds are the value itself where there are none."""
    metric = row["metrics"].get(quantity.metric, {})
    value = metric.get(quantity.value)
    if not is_number(value):
        return None
    low, high = (metric.get(name) for name in ("low", "high"))
    return value, min(low, value) if is_number(low) else value, max(high, value) if is_number(high) else value


def draw_pareto(plot: Pareto, shape: Shape, title: str) -> Figure:
    """Names beside the lines, or in a legend below where they would cover something.

    Args:
        title: of the figure, "" for none.
    """
    figure, fits = _draw(plot, shape, title)
    if fits and len(plot.series) <= _MOST_NAMES:
        return figure
    edge = _TICK_GAP if title else 0
    legend = _add_legend(figure, plot, edge)  # only to see how high it is
    figure, _ = _draw(plot, shape, title, legend.get_window_extent().height + edge)
    _add_legend(figure, plot, edge)
    return figure


def _draw(plot: Pareto, shape: Shape, title: str, legend: float = 0.0) -> tuple[Figure, bool]:
    """The figure, and whether all names fit beside the lines.

    Args:
        legend: points left free for one; 0 for names beside the lines.
    """
    font = shape.font
    below = 5.5 * font + legend
    height = shape.height + legend
    above = 2.0 * font + (2.6 * font if title else 0)
    figure = new_figure(shape, height)
    axes = figure.add_axes((0, below / height, 1, 1 - (above + below) / height))
    if plot.reference:
        _draw_reference(axes, plot.reference)
    for one in plot.series:
        _draw_series(axes, one, plot, shape)
    _y_axis(axes, plot)
    _x_axis(axes, plot, shape)
    left, right = _tick_width(axes) + 2 * _TICK_GAP, 2.2 * font
    axes.set_position(
        (left / shape.width, below / height, 1 - (left + right) / shape.width, 1 - (above + below) / height)
    )
    edge = _TICK_GAP / shape.width if title else 0
    figure.text(edge, 1 - (above - 0.7 * font) / height, plot.quantity.unit, color=light("muted"), va="bottom")
    if title:
        figure.text(edge, 1 - 0.7 * font / height, title, fontsize=1.15 * font, va="top")
    methods = [_label_of(axes, one, plot) for one in plot.series]
    references = [_label_of_reference(axes, plot.reference)] if plot.reference else []
    return figure, place_labels(axes, [*methods, *references], references if legend else [*methods, *references])


def _add_legend(figure: Figure, plot: Pareto, edge: float) -> Legend:
    """Below the panel, so many points from the edges, in as many columns as there is room for."""
    drawn = {container.get_label(): container for container in figure.axes[0].containers}
    handles = [drawn[one.method] for one in plot.series]
    for columns in range(min(4, len(handles)), 0, -1):
        legend = figure.legend(
            handles=handles,
            ncols=columns,
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(edge / figure.bbox.width, edge / figure.bbox.height),
            borderpad=0,
            borderaxespad=0,
            handlelength=1.6,
            handletextpad=0.5,
            columnspacing=1.0,
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width - 2 * edge:
            return legend
        legend.remove()
    raise AssertionError("one column always is an answer")


def _draw_series(axes: Axes, series: _Series, plot: Pareto, shape: Shape) -> None:
    floor = plot.limits[0] if plot.quantity.log else -np.inf
    low, value, high = (np.maximum(part, floor) for part in (series.lows, series.values, series.highs))
    base, _, kv_type = series.method.partition("+")
    big = series.marker in "*XP"  # of the same size, they look smaller
    line = {"": "-", "kv-q8_0": "--"}.get(kv_type, ":") if len(value) > 1 else "none"
    bars = axes.errorbar(
        series.shares,
        value,
        yerr=(value - low, high - value),
        color=series.colour,
        ls=line,
        lw=2.4 if base == "depth" else 1.6,
        marker=series.marker,
        ms=(0.6 if big else 0.46) * shape.font,
        mew=1.3 if kv_type else 0.5,
        mfc=light("paper") if kv_type else series.colour,  # hollow: with quantised K and V
        elinewidth=1.2,
        label=series.method,
        zorder=4 if base == "depth" else 3,
    )
    bars.lines[0].set_clip_on(False)  # an interval may leave the panel, a mean does not
    for bar in bars.lines[2]:
        bar.set_alpha(0.5)


def _draw_reference(axes: Axes, reference: _Reference) -> None:
    if reference.low < reference.high:
        axes.axhspan(reference.low, reference.high, color=light("band"), lw=0, zorder=1)
    axes.axhline(reference.value, color=light("muted"), lw=1.2, ls=(0, (4, 2)), zorder=1.5)


def _label_of_reference(axes: Axes, reference: _Reference) -> Label:
    x = np.linspace(*axes.get_xlim(), 26)[-2:0:-1]
    anchors = np.array([(each, y) for each in x for y in (reference.high, reference.low)])
    line = outline(axes, np.stack([x, np.full_like(x, reference.value)], axis=1))
    return Label(reference.name, light("muted"), anchors, line, faint=True)


def _label_of(axes: Axes, series: _Series, plot: Pareto) -> Label:
    low, value, high = (np.clip(part, *plot.limits) for part in (series.lows, series.values, series.highs))
    points = np.stack([series.shares, value], axis=1)
    bars = [outline(axes, np.array([(x, y0), (x, y1)])) for x, y0, y1 in zip(series.shares, low, high, strict=True)]
    # beside an end if it can be, else along the line: parts of it in pixels, whatever the scale
    pixels = axes.transData.transform(points)
    parts = [pixels[:-1] + share * np.diff(pixels, axis=0) for share in (0.5, 0.25, 0.75)]
    along = axes.transData.inverted().transform(np.concatenate(parts))
    anchors = np.concatenate([points[[-1, 0]] if len(points) > 1 else points, points[1:-1], along])
    return Label(series.method, series.colour, anchors, np.concatenate([outline(axes, points), *bars]))


def _y_axis(axes: Axes, plot: Pareto) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = plot.limits
    if plot.quantity.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,), numticks=20))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axes.set_ylim(low, high)
    axes.tick_params(length=0, pad=_TICK_GAP)


def _x_axis(axes: Axes, plot: Pareto, shape: Shape) -> None:
    """Bytes in percent of the full cache, and in MiB below."""
    ticks = np.linspace(0, 1, 6)
    end = max(1.0, *(float(one.shares.max()) for one in plot.series))
    axes.set_xlim(0, 1.04 * end)
    axes.set_xticks(ticks, [f"{100 * tick:.0f}{' %' if tick == 1 else ''}" for tick in ticks])
    mib = plot.bytes_full / 2**20
    digits = 0 if mib >= 20 else 1 if mib >= 2 else 2
    for tick in ticks:
        axes.annotate(
            f"{tick * mib:.{digits if tick else 0}f}{' MiB' if tick == 1 else ''}",
            (tick, 0),
            (0, -_TICK_GAP - 1.4 * shape.font),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            color=light("muted"),
        )
    axes.set_xlabel("KV cache, share of the full F16 cache", labelpad=1.9 * shape.font)


def _tick_width(axes: Axes) -> float:
    """Points that the labels of the y axis are wide."""
    renderer = axes.figure.canvas.get_renderer()
    low, high = axes.get_ylim()
    shown = [label for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    return max((label.get_window_extent(renderer).width for label in shown), default=0.0)
