"""Names of points, placed where they cover neither each other nor what is drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from loopscope.figures.style import GREY, INK, TINY, Figure

_NEAR = 8.0  # points: closer in x than this, the points of one text stand above each other
_MARK = 3.2  # points: half the size of a marker with its edge
_CLEAR = 1.5  # points: a name is nearer to its own point than to another by at least this
_GAPS = (2.0, 8.0, 15.0, 24.0, 36.0)
_SIDES = np.array([[0, 1], [0, -1], [1, 0], [-1, 0], [1, 1], [-1, 1], [1, -1], [-1, -1]])

Box = Float[np.ndarray, "4"]
"""Left, bottom, right, top in pixels."""

Boxes = Float[np.ndarray, "_ 4"]


@dataclass(frozen=True, kw_only=True)
class Tag:
    """A point and what is written beside it.

    Attributes:
        text: What is written.
        x: Data coordinate.
        y: Data coordinate of the marker.
        low: Lower end of its whisker.
        high: Upper end of its whisker.
        shift: How far to the right of `x` it is drawn, in points.
    """

    text: str
    x: float
    y: float
    low: float
    high: float
    shift: float = 0.0


class _Place(NamedTuple):
    cost: float
    anchor: Float[np.ndarray, "2"]
    centre: Float[np.ndarray, "2"]
    box: Box
    leader: Boxes


def place_tags(fig: Figure, ax: Axes, tags: Sequence[Tag]) -> None:
    """Write the tags; points of one text that stand above each other get it once.

    Args:
        fig: The figure, everything else drawn; its layout is computed here.
        ax: Where the points are.
        tags: What to write.
    """
    place_tags_of(fig, [(ax, tags)])


def place_tags_of(fig: Figure, panels: Sequence[tuple[Axes, Sequence[Tag]]]) -> None:
    """Write the tags of several panels, as `place_tags` does.

    Args:
        fig: The figure, everything else drawn; its layout is computed here.
        panels: Each with what to write into it.
    """
    for _ in range(2):  # the layout settles when it has seen the ticks that it leads to
        fig.draw_without_rendering()
    for ax, tags in panels:
        if tags:
            _place(ax, tags, fig)


def _place(ax: Axes, tags: Sequence[Tag], fig: Figure) -> None:
    unit = fig.dpi / 72
    points = np.array([_around(ax, tag, unit) for tag in tags])
    taken, lines = points, _lines(ax, unit)
    for members in _stacks(ax, tags, points, unit):
        text = tags[members[0]].text
        size = _size(fig, ax, text)
        best = min(_places(ax, members, size, unit, taken, lines), key=lambda place: place.cost)
        taken = np.vstack([taken, best.box])
        lines = np.vstack([lines, best.leader])
        _write(ax, text, best, unit)


def _write(ax: Axes, text: str, place: _Place, unit: float) -> None:
    """Write a tag at its place, with a line to its point where it is not beside it."""
    x, y = ax.transData.inverted().transform(place.anchor)
    dx, dy = (place.centre - place.anchor) / unit
    ax.annotate(
        text,
        (x, y),
        (dx, dy),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=TINY,
        color=INK,
        annotation_clip=False,
        arrowprops={"arrowstyle": "-", "lw": 0.4, "color": GREY, "shrinkA": 0, "shrinkB": 2}
        if len(place.leader)
        else None,
    ).set_in_layout(False)


def _stacks(ax: Axes, tags: Sequence[Tag], boxes: Boxes, unit: float) -> Iterator[list[int]]:
    """Which tags to write once: of one text, at about one x, with no other point between them."""
    across = [ax.transData.transform((tag.x, tag.y))[0] / unit for tag in tags]
    stack: list[int] = []
    for i in sorted(range(len(tags)), key=lambda i: (tags[i].text, -tags[i].y)):
        trial = [*stack, i]
        foreign = boxes[[tag.text != tags[i].text for tag in tags]]
        apart = tags[trial[0]].text != tags[i].text or np.ptp([across[j] for j in trial]) > _NEAR
        if stack and (apart or _shared(_union(boxes[trial]), foreign) > 0):
            yield stack
            stack = [i]
        else:
            stack = trial
    if stack:
        yield stack


def _places(
    ax: Axes,
    members: Sequence[int],
    size: Float[np.ndarray, "2"],
    unit: float,
    taken: Boxes,
    lines: Boxes,
) -> Iterator[_Place]:
    """Candidate places around a stack of points, the members of those taken."""
    stack = _union(taken[members])
    rest = np.delete(taken, members, axis=0)
    middle, half = (stack[:2] + stack[2:]) / 2, (stack[2:] - stack[:2]) / 2
    frame = np.array(ax.get_window_extent().extents)
    for number, gap in enumerate(_GAPS):
        for order, side in enumerate(_SIDES):
            right, up = side
            if not up and half[1] > 2 * _MARK * unit:
                continue  # beside the middle of a tall stack there may be no point
            # above and below, a name moved sideways begins or ends at its marker
            clear = np.array([-half[0] if up else half[0] + gap * unit, half[1] + gap * unit])
            centre = middle + side * (clear + size / 2)
            edge = middle + half * (0 if up else right, up)
            box = np.concatenate([centre - size / 2, centre + size / 2])
            leader = _along(edge, centre, unit) if number else np.empty((0, 4))
            cost = 10.0 * _shared(box, taken) + 2.0 * _shared(box, lines)
            cost += 50.0 * (float(np.prod(size)) - _shared(box, frame[None]))
            cost += 5.0 * sum(_shared(dot, rest) for dot in leader)
            if _apart(box, rest) < _apart(box, stack[None]) + _CLEAR * unit:
                cost += 60.0 * unit**2  # whose name it is would be unclear
            cost += unit**2 * (0.5 * order + 6.0 * number)
            yield _Place(cost, edge, centre, box, leader)


def _around(ax: Axes, tag: Tag, unit: float) -> Box:
    """A point with its marker and whisker."""
    (x, low), (_, high) = ax.transData.transform([(tag.x, tag.low), (tag.x, tag.high)])
    half, x = _MARK * unit, x + tag.shift * unit
    return np.array([x - half, low - half, x + half, high + half])


def _lines(ax: Axes, unit: float) -> Boxes:
    """The joining lines, as small boxes along them."""
    boxes = [np.empty((0, 4))]
    for container in ax.containers:
        if isinstance(container, ErrorbarContainer):
            points = ax.transData.transform(container[0].get_xydata())
            boxes += [_along(start, end, unit) for start, end in pairwise(points)]
    return np.vstack(boxes)


def _along(start: np.ndarray, end: np.ndarray, unit: float) -> Boxes:
    steps = max(2, int(np.hypot(*(end - start)) / (2 * unit)))
    points = start + np.linspace(0, 1, steps)[:, None] * (end - start)
    return np.hstack([points - unit, points + unit])


def _size(fig: Figure, ax: Axes, text: str) -> Float[np.ndarray, "2"]:
    """Width and height of a tag in pixels."""
    artist = ax.text(0, 0, text, fontsize=TINY)
    box = artist.get_window_extent()
    artist.remove()
    return np.array([box.width + fig.dpi / 72, box.height])


def _union(boxes: Boxes) -> Box:
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])


def _apart(box: Box, boxes: Boxes) -> float:
    """Distance to the nearest of some boxes, 0 where they touch."""
    gaps = np.maximum(box[:2] - boxes[:, 2:], boxes[:, :2] - box[2:]).clip(min=0)
    return float(np.hypot(*gaps.T).min(initial=np.inf))


def _shared(box: Box, boxes: Boxes) -> float:
    """Area in which a box overlaps others, those that overlap each other counted each."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    return float(sides.clip(min=0).prod(axis=1).sum())
