"""Where the states go: steps, angles, contraction and distances along the loop."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

from loopscope.analysis.tables import Tables
from loopscope.errors import unknown_name
from loopscope.figures.courses import (
    Course,
    add_legend,
    course_note,
    courses,
    draw_course,
    finish_axes,
    head_panel,
)
from loopscope.figures.notes import note, options_note, samples_note, states_note
from loopscope.figures.panels import Panel, choose, need, say_unsound, shortened
from loopscope.figures.style import (
    BLUE,
    GREY,
    NORMAL,
    ORANGE,
    PAGE_WIDTH,
    SMALL,
    VERMILLION,
    Figure,
    new_figure,
    style,
)

VIEWS = {"state": "h", "direction": "ĥ"}
"""View → the letter of its states; ĥ is h/‖h‖."""

_KINDS = {"settles": BLUE, "orbits": ORANGE, "drifts": VERMILLION}
_NARROW = 300.0  # highest over lowest value, below which a logarithmic axis gets more numbers
_NAME = 20  # letters of a model beside its bar
_BARS = 10  # models with a bar each


class _Lines(NamedTuple):
    """A panel: its title and what it shows, the column of its lines, and that of thin ones."""

    title: str
    meaning: str
    column: str
    thin: str = ""


_PANELS = (
    _Lines("step", "‖Δ(t)‖/‖{h}(t)‖ per token, Δ(t) = {h}(t+1) − {h}(t)", "size"),
    _Lines("angle", "∠(Δ(t), Δ(t−1)), of the mean cosine", "angle"),
    _Lines("acceleration", "‖Δ(t) − Δ(t−1)‖/‖{h}(t)‖ per token", "acceleration"),
    _Lines("contraction", "σ₁ of ∂{h}(t+1)/∂{h}(t); thin: ‖Δ(t+1)‖/‖Δ(t)‖", "contraction", "rate"),
    _Lines("distance", "to {h}(T); thin: to the extrapolated limit", "to_last", "to_limit"),
)


def orbit(
    tables: Tables,
    models: Sequence[str] | str | None = None,
    view: str = "state",
    part: str = "core",
) -> Figure:
    """Draw where the states go: do they settle, orbit or drift?

    Panels: step, angle between steps and acceleration of each token (2509.23314), the largest
    singular value of each iteration's Jacobian with the observed rate beside it (below 1 nearby
    states come closer), the distance to the last state and to the extrapolated limit, and the
    shares of the kinds of path. One line per model: the mean over samples with its 95 % interval;
    beyond the trained number of loops it is dotted.

    Args:
        tables: What was measured; needs `orbit`.
        models: Names in the order of the legend; None takes all.
        view: `state`, or `direction` for h/‖h‖, in which growth counts for nothing.
        part: `core`, or one of its layers (`layer0` …), whose states are those after that layer.

    Returns:
        The figure.

    Raises:
        UnknownNameError: for a view or part that is not in the table.
        InputError: if the table is missing or a model is not in it.
    """
    frame = need(tables, "orbit")
    for column, value in (("view", view), ("part", part)):
        known = [str(x) for x in frame[column].unique()]
        if value not in known:
            raise unknown_name(column, value, known)
    frame = frame[frame["view"].eq(view) & frame["part"].eq(part)]
    frame = frame.assign(angle=np.degrees(np.arccos(frame["cosine"].clip(-1, 1))))
    panels = choose(tables, frame, models, "orbit")
    lines = {
        column: courses(tables, _existing(frame, column), panels, column)
        for shown in _PANELS
        for column in (shown.column, shown.thin)
        if column
    }
    drawn = lines["size"]
    with style():
        fig, axes, columns = _page([course.title for course in drawn])
        for ax, shown in zip(axes, _PANELS, strict=False):
            states = shown.column == "to_last"  # h(0) … h(T); the others are of steps
            _draw(ax, lines[shown.column], lines.get(shown.thin, []), of_states=states)
            letter = VIEWS[view] if part == "core" else f"{VIEWS[view]}ˡ"
            _head(ax, shown.title, shown.meaning.format(h=letter))
        _mark(axes)
        _draw_kinds(axes[-1], frame, drawn)
        add_legend(fig, drawn, columns)
        note(
            fig,
            course_note(drawn, [course.K - 1 for course in drawn]),
            "ĥ = h/‖h‖, its length held where it is differentiated." if view == "direction" else "",
            _kinds_note(drawn, frame),
            _contraction_note(frame, panels),
            states_note(panels),
            samples_note(frame[frame["t"].eq(0)], panels, "size"),
            options_note(tables, panels, "orbit"),
        )
    return fig


def _existing(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows that have a value, and those whose value was left out for a reason."""
    values = frame[column].to_numpy(np.float64)
    exists = (np.isfinite(values) & ((column != "to_last") | (values > 0))) | frame["flag"].notna()
    return frame[exists] if exists.any() else frame[frame["t"].eq(0)]


def _page(titles: Sequence[str]) -> tuple[Figure, list[Axes], int]:
    letters = max(len(line) for title in titles for line in title.split("\n"))
    columns = max(1, min(6, len(titles), int(PAGE_WIDTH // (0.42 + 0.062 * letters))))
    rows = -(-len(titles) // columns)
    columns = -(-len(titles) // rows)
    fig = new_figure(PAGE_WIDTH, 4.9 + 0.135 * rows)
    return fig, list(fig.subplots(2, 3).flat), columns


def _head(ax: Axes, title: str, meaning: str) -> None:
    head_panel(ax, title, meaning)
    ax.set_title(title, fontsize=NORMAL, pad=13)


def _draw(ax: Axes, lines: Sequence[Course], thin: Sequence[Course], *, of_states: bool) -> None:
    """Draw the lines of one panel: an angle on a plain axis, else on a logarithmic one."""
    sound = [course for course in lines if course.sound]
    for course in sound:
        draw_course(ax, course, course.K if of_states else course.K - 1)
    for course in (course for course in thin if course.sound):
        rows = course.rows[course.rows["n"] > 0]
        look = course.look | {"marker": "none", "linewidth": 0.7, "alpha": 0.8}
        ax.plot(rows["t"], rows["mean"], label="_thin", **look)
    if not sound:
        say_unsound(ax, sum(int(course.rows["n_flagged"].sum()) for course in lines))
        ax.set_ylim(0, 1)
    every = [*lines, *thin]
    if any(len(course.rows) for course in every):
        finish_axes([ax], [every])
        last = max(int(course.rows["t"].max()) for course in every if len(course.rows))
        ax.set_xticks(range(last + 1) if last < 8 else ax.get_xticks())
    ax.set_xlabel("$t$" if of_states else "iteration $t$")


def _mark(axes: Sequence[Axes]) -> None:
    """Scale the axes; right angles, and contraction below 1."""
    step, angle, acceleration, contraction, distance = axes[:5]
    for ax in (step, acceleration, contraction, distance):
        _logarithmic(ax)
    angle.set_ylim(0, 180)
    angle.yaxis.set_major_locator(FixedLocator([0, 45, 90, 135, 180]))
    angle.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}°")
    for ax, value in ((angle, 90), (contraction, 1)):
        low, high = ax.get_ylim()
        ax.axhline(value, color=GREY, linewidth=0.9, zorder=1.2)
        ax.set_ylim(low if ax is angle else min(low, 0.9), high if ax is angle else max(high, 1.1))


def _logarithmic(ax: Axes) -> None:
    values = [y for line in ax.lines for y in np.asarray(line.get_ydata(), float)]
    positive = [y for y in values if y > 0 and np.isfinite(y)]
    if not positive:
        return
    low, high = min(positive), max(positive)
    ax.set_yscale("log")
    ax.set_ylim(low / 1.2, high * 1.25)
    if high < _NARROW * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def _draw_kinds(ax: Axes, frame: pd.DataFrame, lines: Sequence[Course]) -> None:
    """Draw the shares of the kinds of path as one bar per model."""
    _head(ax, "kind of path", "share of tokens that settle, orbit or drift")
    shown = list(lines)[:_BARS]
    begins = frame[frame["t"].eq(0) & frame["flag"].isna()]
    left = np.zeros(len(shown))
    for kind, color in _KINDS.items():
        shares = [float(course.panel.rows(begins)[kind].mean()) for course in shown]
        width = np.nan_to_num(np.array(shares))
        ax.barh(range(len(shown)), width, left=left, color=color, height=0.7, label=kind)
        for y, (start, share) in enumerate(zip(left, width, strict=True)):
            if share >= 0.12:
                ax.text(
                    start + share / 2, y, f"{100 * share:.0f}", ha="center", va="center",
                    fontsize=SMALL - 0.5, color="white" if kind != "orbits" else "black",
                )  # fmt: skip
        left += width
    for bare in np.flatnonzero(left == 0):
        ax.text(
            0.02, float(bare), "none: fewer than 2 steps", va="center", fontsize=SMALL, color=GREY
        )
    ax.set_yticks(range(len(shown)))
    ax.set_yticklabels([shortened(course.panel.title, _NAME) for course in shown])
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.tick_params(axis="y", length=0)
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, columnspacing=1.0,
        handlelength=0.8, handletextpad=0.4,
    )  # fmt: skip


def _kinds_note(drawn: Sequence[Course], frame: pd.DataFrame) -> str:
    """Over how many iterations each path was judged."""
    if not frame["settles"].notna().any():
        return ""
    depths = {course.panel.title: int(course.panel.rows(frame)["t"].max()) for course in drawn}
    if len({*depths.values()}) == 1:
        return f"Kinds of path: over {next(iter(depths.values()))} iterations."
    each = ", ".join(f"{name} {T}" for name, T in depths.items())
    return f"Kinds of path are judged over unequal numbers of iterations: {each}."


def _contraction_note(frame: pd.DataFrame, panels: Sequence[Panel]) -> str:
    """On how many samples contraction rests."""
    rows = frame[np.isfinite(frame["contraction"])]
    counts = {panel.rows(rows)["sample"].nunique() for panel in panels} - {0}
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    numbers = f"{low}" if low == high else f"{low} to {high}"
    return f"Contraction: {numbers} samples each, all their tokens together."
