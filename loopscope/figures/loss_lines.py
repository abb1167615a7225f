"""What each loop is worth: the loss when the coda reads the state before it is finished."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from loopscope.analysis.tables import Tables, model_record
from loopscope.figures.courses import (
    Course,
    add_legend,
    course_note,
    courses,
    draw_course,
    finish_axes,
    head_panel,
    lacking_note,
    line_page,
)
from loopscope.figures.names import printable
from loopscope.figures.notes import note, samples_note
from loopscope.figures.panels import Panel, choose, need, say_unsound
from loopscope.figures.style import GREY, Figure, style
from loopscope.names import READINGS

READ = {
    "raw": "the coda reads $h(t)$ as it is",
    "matched": "each token at its length in $h(K)$",
    "fitted": "through a map to $h(K)$, fitted on other text",
}
"""What each reading does, in a line."""

_UPPER = 0.25  # share of the axis above the cut
_WORTH = 0.6  # of what is below the cut: less above it needs no second scale
_ROOM = 1.0  # above the highest loss at the end, as a share of what those losses span
_LIKE = 2.0  # losses at the end up to this many times the least one set the lower part


def loss_per_loop(tables: Tables, models: Sequence[str] | str | None = None) -> Figure:
    """Draw the loss when the coda reads h(t) instead of h(K), against t, a panel per reading.

    Raw: the coda reads h(t) as it is, which is what fewer loops give. Matched: each token of h(t)
    is brought to its length in h(K). Fitted: h(t) goes through an affine map to h(K), fitted on
    other windows. A loop works where the loss falls in all three.

    One line per model: the mean over samples with its 95 % interval. Beyond the trained number
    of loops, where it was measured, a line is dotted. Losses far above those at the end, such as
    at t = 0, lie in an upper part of the axis that is logarithmic.

    Args:
        tables: What was measured; needs `readout`.
        models: Names in the order of the legend; None takes all.

    Returns:
        The figure; one panel where there is one reading.

    Raises:
        InputError: if the table is missing or a model is not in it.
    """
    frame = need(tables, "readout")
    panels = choose(tables, frame, models, "readout")
    by_reading = _by_reading(tables, frame, panels)
    models_drawn = courses(tables, frame, panels)
    lines = [course for drawn in by_reading.values() for course in drawn]
    ends = [course.K for course in lines]
    with style():
        fig, axes, columns = line_page([c.title for c in models_drawn], len(by_reading))
        for ax, (reading, drawn) in zip(axes, by_reading.items(), strict=True):
            for course in drawn:
                if course.sound:
                    draw_course(ax, course, course.K)
            if len(axes) > 1 or reading != "raw":
                head_panel(ax, reading, READ[reading])
            if not any(course.sound for course in drawn):
                say_unsound(ax, sum(int(course.rows["n_flagged"].sum()) for course in drawn))
            ax.set_xlabel(
                "the coda reads $h(t)$, after $t$ loops" if len(axes) == 1 else "$t$ loops"
            )
        cut = fit_losses(axes, lines, ends)
        finish_axes(axes, list(by_reading.values()))
        add_legend(fig, models_drawn, columns)
        axes[0].set_ylabel(_loss_label(tables, panels))
        note(
            fig,
            course_note(lines, ends),
            "Above the grey line the axis is logarithmic." if cut else "",
            lacking_note(by_reading),
            samples_note(frame, panels),
        )
    return fig


def _loss_label(tables: Tables, panels: Sequence[Panel]) -> str:
    """The axis: in nats, but of a loss that the user gave."""
    models = dict.fromkeys(panel.model for panel in panels)
    own = {model_record(tables.provenance, model).options.get("loss") for model in models}
    if own <= {None}:
        return "loss (nats per token)"
    return f"loss ({printable(str(own.pop()))})" if len(own) == 1 else "loss (units differ)"


def _by_reading(
    tables: Tables, frame: pd.DataFrame, panels: Sequence[Panel]
) -> dict[str, list[Course]]:
    """The lines of each reading that any of the models has."""
    lines = {}
    for reading in READINGS:
        rows = frame[frame["reading"].eq(reading)]
        if any(len(panel.rows(rows)) for panel in panels):
            lines[reading] = courses(tables, rows, panels)
    return lines


def fit_losses(axes: Sequence[Axes], lines: Sequence[Course], ends: Sequence[int]) -> float | None:
    """Fit the y-axis to the losses at the end; what lies far above gets a part of its own.

    Args:
        axes: The panels, lines drawn; they share the axis.
        lines: The lines of all panels.
        ends: The t of each at which its loss ends.

    Returns:
        Where the upper, logarithmic part begins; None where it is not needed.
    """
    parts = [c.rows[c.rows["n"] > 0] for c in lines]
    if not any(len(rows) for rows in parts):
        axes[0].set_ylim(0, 1)
        return None
    low = min(float(rows["low"].min()) for rows in parts if len(rows))
    high = max(float(rows["high"].max()) for rows in parts if len(rows))
    trained = [c.look.get("linestyle") != "--" for c in lines]
    cut = _cut(
        [
            rows[rows["t"] <= end]
            for rows, end, fits in zip(parts, ends, trained, strict=True)
            if fits or not any(trained)
        ],
        low,
    )
    if high - low <= (1 + _WORTH) * (cut - low) or cut <= 0:
        room = 0.05 * (high - low) or 0.1
        axes[0].set_ylim(low - room, high + room)
        return None
    top = high * (high / cut) ** 0.08
    _break_axis(axes[0], low - 0.05 * (cut - low), cut, top)
    for ax in axes:
        ax.axhspan(cut, top, color="#F3F3F3", linewidth=0, zorder=-2)
        ax.axhline(cut, color=GREY, linewidth=0.7, zorder=-1)
    return cut


def _break_axis(ax: Axes, low: float, cut: float, high: float) -> None:
    """Make the y-axis linear up to the cut and logarithmic from there, its ticks to fit."""
    share = _UPPER / (1 - _UPPER) * (cut - low) / math.log(high / cut)

    def forward(y: np.ndarray) -> np.ndarray:
        y = np.asarray(y, dtype=float)
        return np.where(y <= cut, y, cut + share * np.log(np.maximum(y, cut) / cut))

    def backward(y: np.ndarray) -> np.ndarray:
        y = np.asarray(y, dtype=float)
        return np.where(y <= cut, y, cut * np.exp(np.maximum(y - cut, 0) / share))

    ax.set_yscale("function", functions=(forward, backward))
    ax.set_ylim(low, high)
    below = [y for y in MaxNLocator(nbins=6).tick_values(low, cut) if low <= y <= cut]
    top = float(forward(np.array(high)))
    above = _upper_ticks(cut, high, lambda y: (float(forward(np.array(y))) - low) / (top - low))
    digits = max((len(f"{y:g}".partition(".")[2]) for y in below), default=0)
    ax.yaxis.set_major_locator(FixedLocator([*below, *above]))
    ax.yaxis.set_major_formatter(
        FixedFormatter([*(f"{y:.{digits}f}" for y in below), *(f"{y:,g}" for y in above)])
    )
    ax.yaxis.set_minor_locator(NullLocator())


def _cut(parts: Sequence[pd.DataFrame], low: float) -> float:
    """The highest loss that the linear part shows."""
    ends = [rows.iloc[-1] for rows in parts if len(rows)]
    if not ends:
        return math.inf
    least = min(end["mean"] for end in ends)
    top = max(end["high"] for end in ends if end["mean"] <= _LIKE * max(least, 0.0))
    return top + _ROOM * max(top - low, 0.1 * top)


def _upper_ticks(cut: float, high: float, place: Callable[[float], float]) -> list[float]:
    """A few round losses in the logarithmic part, apart enough to be read."""
    first, last = math.floor(math.log10(cut)), math.ceil(math.log10(high))
    powers = range(first, last + 1, max(1, (last - first) // 3))
    ticks: list[float] = []
    for y in sorted(base * 10.0**p for p in powers for base in (1, 2, 5)):
        edge = place(ticks[-1]) if ticks else place(cut)
        if cut < y <= high and place(y) - edge >= 0.065:
            ticks.append(y)
    return ticks
