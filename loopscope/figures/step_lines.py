"""How far each loop moves the state: the relative step from h(t) to h(t+1)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

from loopscope.analysis.tables.frames import Tables
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
    found = courses(tables, frame, panels)
    ends = [c.K - 1 for c in found]
    with style():
        fig, ax, columns = line_page([c.title for c in found])
        values = [c.rows.loc[c.rows["n"] > 0, ["low", "mean", "high"]] for c in found]
        seen = np.concatenate([v.to_numpy().ravel() for v in values])
        positive = seen[seen > 0]
        floor = positive.min() / 3 if len(positive) else 0.0
        ax.set_yscale("log")
        for course, end in zip(found, ends, strict=True):
            if course.sound:
                course.rows[["low", "mean", "high"]] = course.rows[["low", "mean", "high"]].clip(
                    lower=floor
                )
                draw_course(ax, course, end)
        still = bool((seen == 0).any())
        if len(positive):
            low = floor if still else positive.min() / 1.15
            ax.set_ylim(low, 1.15 * positive.max())
            if positive.max() < _NARROW * positive.min():
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            else:
                ax.yaxis.set_major_locator(LogLocator(numticks=7))
                ax.yaxis.set_major_formatter(LogFormatterSciNotation())
            ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            if not len(seen):
                say_unsound(ax, sum(int(c.rows["n_flagged"].sum()) for c in found))
            ax.set_yscale("linear")
            ax.set_ylim(0, 1)
        finish_page(fig, ax, found, columns)
        ax.set_xlabel("iteration $t$")
        ax.set_ylabel(STEP_LABEL)
        note(
            fig,
            course_note(found, ends),
            "Steps of exactly 0 stand on the lower edge." if still and len(positive) else "",
            states_note(panels),
            samples_note(frame, panels),
            options_note(tables, panels, "delta"),
        )
    return fig
