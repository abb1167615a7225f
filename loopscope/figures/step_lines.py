"""How far each loop moves the state: the relative step from h(t) to h(t+1)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

from loopscope.analysis.tables import Tables
from loopscope.figures.courses import course_note, courses, draw_course, finish_page, line_page
from loopscope.figures.notes import note, options_note, samples_note, states_note
from loopscope.figures.panels import choose, need, say_unsound
from loopscope.figures.style import Figure, style

STEP_LABEL = "‖h(t+1)−h(t)‖ / ‖h(t)‖"
_NARROW = 30.0  # the greatest step over the least, below which the axis gets more numbers


def steps(tables: Tables, models: Sequence[str] | str | None = None) -> Figure:
    """Draw the relative step ‖h(t+1) − h(t)‖_F / ‖h(t)‖_F of each iteration on a log axis.

    One line per model (and loop): the mean over samples with its 95 % interval. A line that falls
    straight comes closer to a fixed point by the same factor in every loop.

    Args:
        tables: What was measured; needs `delta`.
        models: Names in the order of the legend; None takes all.

    Returns:
        The figure.

    Raises:
        InputError: if the table is missing or a model is not in it.
    """
    frame = need(tables, "delta")
    panels = choose(tables, frame, models, "delta")
    lines = courses(tables, frame, panels)
    ends = [c.K - 1 for c in lines]
    with style():
        fig, ax, columns = line_page([c.title for c in lines])
        values = [c.rows.loc[c.rows["n"] > 0, ["low", "mean", "high"]] for c in lines]
        drawn = np.concatenate([v.to_numpy().ravel() for v in values])
        positive = drawn[drawn > 0]
        floor = positive.min() / 3 if len(positive) else 0.0
        ax.set_yscale("log")
        for course, end in zip(lines, ends, strict=True):
            if course.sound:
                course.rows[["low", "mean", "high"]] = course.rows[["low", "mean", "high"]].clip(
                    lower=floor
                )
                draw_course(ax, course, end)
        still = bool((drawn == 0).any())
        if len(positive):
            _fit(ax, floor if still else positive.min() / 1.15, positive)
        else:
            if not len(drawn):
                say_unsound(ax, sum(int(c.rows["n_flagged"].sum()) for c in lines))
            ax.set_yscale("linear")
            ax.set_ylim(0, 1)
        finish_page(fig, ax, lines, columns)
        ax.set_xlabel("iteration $t$")
        ax.set_ylabel(STEP_LABEL)
        note(
            fig,
            course_note(lines, ends),
            "Steps of exactly 0 stand on the lower edge." if still and len(positive) else "",
            states_note(panels),
            samples_note(frame, panels),
            options_note(tables, panels, "delta"),
        )
    return fig


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
