"""Names beside what is drawn, where a legend would send the eye back and forth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEP = 3.0  # pixels between the points that stand for a line
_GAP = 8.0  # pixels between a label and the point it names
_TOUCH = 3  # points of a line that a label may cover
_FAR = 14.0  # pixels within which another line makes a label doubtful
_DIRECTIONS = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 1), (-1, -1), (-1, 0))  # right, up


@dataclass(frozen=True)
class Label:
    """A name for one thing in a panel.

    Attributes:
        text: the name.
        colour: of the text.
        anchors: points [n, 2] in data coordinates that it may stand beside, the best ones first.
        pixels: [m, 2] of the thing, see `outline`. Names of other things keep away from them.
        faint: the thing may be written over, if need be.
    """

    text: str
    colour: str
    anchors: np.ndarray
    pixels: np.ndarray
    faint: bool = False


def outline(axes: Axes, points: np.ndarray) -> np.ndarray:
    """Pixels [m, 2] of markers at points [n, 2] in data coordinates, and along the line through them."""
    pixels = axes.transData.transform(points)
    parts = [pixels + 0.6 * _GAP * np.array(direction) for direction in _DIRECTIONS]
    for start, end in zip(pixels[:-1], pixels[1:], strict=True):
        n = max(2, int(np.hypot(*(end - start)) / _STEP))
        parts.append(start + np.linspace(0, 1, n)[:, None] * (end - start))
    return np.concatenate(parts)


def place_labels(axes: Axes, things: Sequence[Label], named: Sequence[Label]) -> bool:
    """Write names where they cover nothing, the ones with the least choice first.

    Args:
        axes: limits and position must be final, at 72 pixels per inch, and the figure's canvas an Agg one.
        things: all that is drawn.
        named: those of them whose names are written.

    Returns:
        False when there is no room: then none is left in the panel.
    """
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    drawn = _pixels(thing for thing in things if not thing.faint)
    written: list[np.ndarray] = []
    texts = []
    for label in sorted(named, key=lambda label: len(label.anchors)):
        text = axes.annotate(label.text, (0, 0), (0, 0), textcoords="offset points", va="bottom", color=label.colour)
        text.set_annotation_clip(False)
        texts.append(text)
        extent = text.get_window_extent(renderer)
        offsets = _offsets(extent.width, extent.height)
        boxes = _boxes(axes.transData.transform(label.anchors), offsets, extent.width, extent.height)
        inside = (boxes[:, :2] >= (frame.x0, frame.y0)).all(axis=1) & (boxes[:, 2:] <= (frame.x1, frame.y1)).all(axis=1)
        covered = _inside(boxes, drawn, 1)
        clear = inside & (covered <= _TOUCH) & ~_overlaps(boxes, written)
        if not clear.any():
            for each in texts:
                each.remove()
            return False
        others = [thing for thing in things if thing is not label]
        near = _inside(boxes, _pixels(thing for thing in others if not thing.faint), _FAR)
        faint = _inside(boxes, _pixels(thing for thing in others if thing.faint), 1)
        cost = 3 * covered + 0.25 * near + 0.5 * faint + np.arange(len(boxes)) / len(_DIRECTIONS)
        best = int(np.where(clear, cost, np.inf).argmin())
        anchor, direction = divmod(best, len(_DIRECTIONS))
        right = _DIRECTIONS[direction][0]
        # held at the side of its anchor, so that it stays beside it in a font of another width
        text.set_horizontalalignment(("right", "center", "left")[right + 1])
        text.xy = tuple(label.anchors[anchor])
        text.set_position((offsets[direction, 0] + extent.width * (1 - right) / 2, offsets[direction, 1]))
        written.append(boxes[best])
    return True


def _pixels(things: Iterable[Label]) -> np.ndarray:
    return np.concatenate([np.empty((0, 2)), *(thing.pixels for thing in things)])


def _offsets(width: float, height: float) -> np.ndarray:
    """Pixels from an anchor to the lower left corner of a text, for each direction."""
    offsets = []
    for right, up in _DIRECTIONS:
        gap = _GAP * (0.7 if right and up else 1.0)
        offsets.append((right * gap - width * (1 - right) / 2, up * gap - height * (1 - up) / 2))
    return np.array(offsets)


def _boxes(anchors: np.ndarray, offsets: np.ndarray, width: float, height: float) -> np.ndarray:
    """Boxes [anchors * directions, 4] in pixels: x0, y0, x1, y1."""
    corners = (anchors[:, None] + offsets).reshape(-1, 2)
    return np.concatenate([corners, corners + (width, height)], axis=1)


def _inside(boxes: np.ndarray, points: np.ndarray, margin: float) -> np.ndarray:
    """Number of points in each box, grown by a margin."""
    low, high = boxes[:, None, :2] - margin, boxes[:, None, 2:] + margin
    return ((points >= low) & (points <= high)).all(axis=2).sum(axis=1)


def _overlaps(boxes: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    found = np.zeros(len(boxes), bool)
    for other in others:
        found |= (boxes[:, :2] < other[2:]).all(axis=1) & (boxes[:, 2:] > other[:2]).all(axis=1)
    return found
