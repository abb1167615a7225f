"""How far each loop moves the state: the relative step from h(t) to h(t+1)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

from loopscope.analysis.tables import Tables
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
from loopscope.figures.notes import note, options_note, samples_note, states_note
from loopscope.figures.panels import choose, need, say_unsound
from loopscope.figures.style import Figure, style

STEP_LABEL = "‖h(t+1)−h(t)‖ / ‖h(t)‖"
TURN_LABEL = "‖ĥ(t+1)−ĥ(t)‖, tokens seen from their midst, at length 1"
_NARROW = 30.0  # the greatest step over the least, below which the axis gets more numbers


def steps(tables: Tables, models: Sequence[str] | str | None = None) -> Figure:
    """Draw the relative step ‖h(t+1) − h(t)‖_F / ‖h(t)‖_F of each iteration on a log axis.

    Beside it, where it was measured, the turn: the step without growth in length, ‖ĥ(t+1) − ĥ(t)‖
    with each token of ĥ seen from the median of all and at length 1 (root mean square). A step
    without a turn makes the state longer, or moves it as a whole.

    One line per model (and loop): the mean over samples with its 95 % interval. A line that falls
    straight comes closer to a fixed point by the same factor in every loop.

    Args:
        tables: What was measured; needs `delta`.
        models: Names in the order of the legend; None takes all.

    Returns:
        The figure; one panel where no turn was measured.

    Raises:
        InputError: if the table is missing or a model is not in it.
    """
    frame = need(tables, "delta")
    panels = choose(tables, frame, models, "delta")
    by_title = {"step": courses(tables, frame, panels)}
    if "turn" in frame:
        turns = courses(tables, frame, panels, "turn")
        by_title |= {"turn": turns} if any(course.sound for course in turns) else {}
    lines = [course for drawn in by_title.values() for course in drawn]
    ends = [course.K - 1 for course in lines]
    with style():
        fig, axes, columns = line_page([c.title for c in by_title["step"]], len(by_title))
        on_edge = _draw(axes, list(by_title.values()), lines)
        finish_axes(axes, list(by_title.values()))
        add_legend(fig, by_title["step"], columns)
        for ax in axes:
            ax.set_xlabel("iteration $t$")
        if len(axes) > 1:
            for ax, title, meaning in zip(axes, by_title, (STEP_LABEL, TURN_LABEL), strict=True):
                head_panel(ax, title, meaning)
            axes[0].set_ylabel("size")
        else:
            axes[0].set_ylabel(STEP_LABEL)
        note(
            fig,
            course_note(lines, ends),
            "Turn: the step without growth in length." if len(axes) > 1 else "",
            "Steps of exactly 0 stand on the lower edge." if on_edge else "",
            states_note(panels),
            lacking_note(by_title),
            samples_note(frame, panels),
            options_note(tables, panels, "delta"),
        )
    return fig


def _draw(
    axes: Sequence[Axes], by_axes: Sequence[Sequence[Course]], lines: Sequence[Course]
) -> bool:
    """Draw the lines of each panel on one logarithmic axis; whether any stands on its edge."""
    numbers = ["low", "mean", "high"]
    values = [c.rows.loc[c.rows["n"] > 0, numbers] for c in lines]
    drawn = np.concatenate([v.to_numpy().ravel() for v in values])
    positive = drawn[drawn > 0]
    floor = positive.min() / 3 if len(positive) else 0.0
    axes[0].set_yscale("log")
    for ax, of_axes in zip(axes, by_axes, strict=True):
        for course in of_axes:
            if course.sound:
                course.rows[numbers] = course.rows[numbers].clip(lower=floor)
                draw_course(ax, course, course.K - 1)
    still = bool((drawn == 0).any())
    if len(positive):
        _fit(axes[0], floor if still else positive.min() / 1.15, positive)
    else:
        if not len(drawn):
            say_unsound(axes[0], sum(int(c.rows["n_flagged"].sum()) for c in lines))
        axes[0].set_yscale("linear")
        axes[0].set_ylim(0, 1)
    return still and len(positive) > 0


def _fit(ax: Axes, low: float, positive: np.ndarray) -> None:
    """Fit the logarithmic axis to the steps that are not 0; a narrow one gets more numbers."""
    ax.set_ylim(low, 1.15 * positive.max())
    if positive.max() < _NARROW * positive.min():
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        ax.yaxis.set_major_locator(LogLocator(numticks=7))
        ax.yaxis.set_major_formatter(LogFormatterSciNotation())
    ax.yaxis.set_minor_formatter(NullFormatter())
