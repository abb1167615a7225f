"""Names of points, placed where they cover neither each other nor what is drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.transforms import Bbox

from loopscope.figures.style import GREY, INK, TINY, Figure

_NEAR = 8.0  # points: closer in x than this, the points of one text stand above each other
_MARK = 3.2  # points: half the size of a marker with its edge
_CLEAR = 1.5  # points: a name is nearer to its own point than to another by at least this
_GAPS = (2.0, 8.0, 15.0, 24.0)
_SIDES = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))


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
    anchor: tuple[float, float]
    centre: tuple[float, float]
    box: Bbox
    leader: list[Bbox]


def place_tags(fig: Figure, ax: Axes, tags: Sequence[Tag]) -> None:
    """Write the tags; points of one text that stand above each other get it once.

    Args:
        fig: The figure, everything else drawn; its layout is computed here.
        ax: Where the points are.
        tags: What to write.
    """
    fig.draw_without_rendering()
    unit = fig.dpi / 72
    taken = [_around(ax, tag, unit) for tag in tags]  # the points first, in their order
    lines = list(_lines(ax, unit))
    for own in _stacks(ax, tags, unit):
        text = tags[own[0]].text
        size = _size(fig, ax, text)
        best = min(_places(ax, own, size, unit, taken, lines), key=lambda place: place.cost)
        taken.append(best.box)
        lines += best.leader
        x, y = ax.transData.inverted().transform(best.anchor)
        dx, dy = (c - a for c, a in zip(best.centre, best.anchor, strict=True))
        ax.annotate(
            text,
            (x, y),
            (dx / unit, dy / unit),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=TINY,
            color=INK,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": GREY, "shrinkA": 0, "shrinkB": 2}
            if best.leader
            else None,
        ).set_in_layout(False)


def _stacks(ax: Axes, tags: Sequence[Tag], unit: float) -> Iterator[list[int]]:
    """Which tags to write once: of one text, at about one x, with no other point between them."""
    boxes = [_around(ax, tag, unit) for tag in tags]
    across = [ax.transData.transform((tag.x, tag.y))[0] / unit for tag in tags]
    stack: list[int] = []
    for i in sorted(range(len(tags)), key=lambda i: (tags[i].text, -tags[i].y)):
        trial = [*stack, i]
        box = Bbox.union([boxes[j] for j in trial])
        foreign = [b for b, tag in zip(boxes, tags, strict=True) if tag.text != tags[i].text]
        apart = tags[trial[0]].text != tags[i].text or np.ptp([across[j] for j in trial]) > _NEAR
        if stack and (apart or any(box.overlaps(b) for b in foreign)):
            yield stack
            stack = [i]
        else:
            stack = trial
    if stack:
        yield stack


def _places(
    ax: Axes,
    members: Sequence[int],
    size: tuple[float, float],
    unit: float,
    taken: Sequence[Bbox],
    lines: Sequence[Bbox],
) -> Iterator[_Place]:
    """Candidate places around a stack of points, which are the given ones of those taken."""
    own = Bbox.union([taken[i] for i in members])
    others = [box for i, box in enumerate(taken) if i not in members]
    anchor = ((own.x0 + own.x1) / 2, (own.y0 + own.y1) / 2)
    frame = ax.get_window_extent().frozen()
    for number, gap in enumerate(_GAPS):
        for order, (right, up) in enumerate(_SIDES):
            if not up and own.height > 4 * _MARK * unit:
                continue  # beside the middle of a tall stack there may be no point
            # above and below, a name moved sideways begins or ends at its marker
            clear = -own.width / 2 if up else own.width / 2 + gap * unit
            centre = (
                anchor[0] + right * (clear + size[0] / 2),
                anchor[1] + up * (own.height / 2 + gap * unit + size[1] / 2),
            )
            box = Bbox.from_bounds(
                centre[0] - size[0] / 2, centre[1] - size[1] / 2, size[0], size[1]
            )
            edge = (
                anchor[0] + (0 if up else right * own.width / 2),
                anchor[1] + up * own.height / 2,
            )
            leader = list(_along(np.array(edge), np.array(centre), unit)) if number else []
            cost = 10.0 * sum(_shared(box, other) for other in taken)
            cost += 2.0 * sum(_shared(box, other) for other in lines)
            cost += 50.0 * (box.width * box.height - _shared(box, frame))
            nearest = min((_apart(box, other) for other in others), default=np.inf)
            if nearest < _apart(box, own) + _CLEAR * unit:
                cost += 60.0 * unit**2  # whose name it is would be unclear
            cost += unit**2 * (0.5 * order + 6.0 * number)
            cost += 5.0 * sum(_shared(dot, other) for dot in leader for other in others)
            yield _Place(cost, edge, centre, box, leader)


def _around(ax: Axes, tag: Tag, unit: float) -> Bbox:
    """A point with its marker and whisker, in pixels."""
    (x, low), (_, high) = ax.transData.transform([(tag.x, tag.low), (tag.x, tag.high)])
    half, x = _MARK * unit, x + tag.shift * unit
    return Bbox([[x - half, low - half], [x + half, high + half]])


def _lines(ax: Axes, unit: float) -> Iterator[Bbox]:
    """The joining lines, as small boxes along them, in pixels."""
    for container in ax.containers:
        if not isinstance(container, ErrorbarContainer):
            continue
        points = ax.transData.transform(container[0].get_xydata())
        for start, end in pairwise(points):
            yield from _along(start, end, unit)


def _along(start: np.ndarray, end: np.ndarray, unit: float) -> Iterator[Bbox]:
    steps = max(2, int(np.hypot(*(end - start)) / (2 * unit)))
    for x, y in start + np.linspace(0, 1, steps)[:, None] * (end - start):
        yield Bbox.from_bounds(x - unit, y - unit, 2 * unit, 2 * unit)


def _size(fig: Figure, ax: Axes, text: str) -> tuple[float, float]:
    """Width and height of a tag in pixels."""
    artist = ax.text(0, 0, text, fontsize=TINY)
    box = artist.get_window_extent()
    artist.remove()
    return box.width + fig.dpi / 72, box.height


def _apart(one: Bbox, other: Bbox) -> float:
    """Distance of two boxes, 0 where they touch."""
    right = max(one.x0 - other.x1, other.x0 - one.x1, 0.0)
    up = max(one.y0 - other.y1, other.y0 - one.y1, 0.0)
    return float(np.hypot(right, up))


def _shared(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else both.width * both.height
