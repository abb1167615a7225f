"""Lines along the loop, one per model: how they look, and where the trained loops end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from scipy.stats import t as student

from loopscope.analysis.tables import Tables, aggregate, model_record
from loopscope.figures.names import untrained_stem, variants
from loopscope.figures.panels import Panel, shortened, unsound_text
from loopscope.figures.style import (
    GREY,
    LINES,
    MARKERS,
    NORMAL,
    PAGE_WIDTH,
    SMALL,
    Figure,
    new_figure,
    variant_look,
)
from loopscope.figures.ticks import every
from loopscope.names import block_number, state_number

WIDTH = 3.5
"""Inches; a column of a two-column page."""

MARKED = 12
"""Values on a line that each have a marker; of more some have."""

_LETTERS = 44  # of a name in the legend
_LABELS, _FEW_LABELS = 14, 8  # of the t-axis: of one panel, of several beside each other
_PATTERNS = ("-", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
_LEAST = 0.1  # of a mean: an interval that would end lower, or below 0, ends there
Look = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Course:
    """One line: a value of one model at every t.

    Attributes:
        panel: Whose it is.
        title: Its name in the legend.
        look: Keywords of `Axes.plot`.
        K: Loops that the model was trained with (or was run with, where nothing tells).
        rows: t, mean, low, high (95 % interval of the mean), n, n_flagged; in the order of t.
    """

    panel: Panel
    title: str
    look: Look
    K: int
    rows: pd.DataFrame

    @property
    def sound(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.rows["n"].any())


def courses(
    tables: Tables, frame: pd.DataFrame, panels: Sequence[Panel], column: str = "value"
) -> list[Course]:
    """Average a table along the loop, and give each line its look.

    Args:
        tables: What was measured; its provenance names variants and untrained twins.
        frame: The table to be drawn, or those of its rows that are, with the column t.
        panels: What is shown.
        column: The column that is averaged.

    Returns:
        The lines, in the order of the panels.
    """
    stats = with_interval(aggregate.with_errors(frame, ["t"], column))
    lines = []
    for panel, look in zip(panels, line_looks(tables.provenance, panels), strict=True):
        rows = panel.rows(stats).sort_values("t")
        title = shortened(panel.title, _LETTERS)
        if not rows["n"].any():
            title += f":\n{unsound_text(int(rows['n_flagged'].sum()))}"
        K = trained_loops(tables, panel) or int(frame["t"].max())
        lines.append(Course(panel=panel, title=title, look=look, K=K, rows=rows))
    return lines


def with_interval(stats: pd.DataFrame) -> pd.DataFrame:
    """Add the 95 % interval of the mean over samples (Student's t, by document).

    Args:
        stats: With mean, error and clusters, of values that are never negative.

    Returns:
        The same with `low` and `high`; both are the mean where there is one cluster.
    """
    clusters = stats["clusters"].to_numpy(dtype=np.float64)
    several = clusters > 1
    half = np.zeros(len(stats))
    error = stats["error"].to_numpy(dtype=np.float64)[several]
    half[several] = student.ppf(0.975, clusters[several] - 1) * error
    mean = stats["mean"].to_numpy(dtype=np.float64)
    low = np.maximum(mean - half, np.minimum(_LEAST * mean, mean))
    return stats.assign(low=low, high=mean + half)


def trained_loops(tables: Tables, panel: Panel) -> int | None:
    """Count the loops that a model runs by itself, from tables that hold no others.

    Args:
        tables: What was measured.
        panel: Whose loops.

    Returns:
        K, or None where neither `update` nor a table of states nor the provenance tells.
    """
    for table, column in (("update", "block"), ("cka", "state_b"), ("rank", "state")):
        frame = getattr(tables, table)
        if frame is None:
            continue
        names = panel.rows(frame)[column].astype(str).unique()
        states = [t for name in names if (t := state_number(name)) is not None]
        iterations = [t + 1 for name in names if (t := block_number(name)) is not None]
        if states or iterations:
            return max(states + iterations)
    return model_record(tables.provenance, panel.model).loops(panel.loop)


def line_looks(provenance: Mapping[str, Any], panels: Sequence[Panel]) -> list[Look]:
    """Give each line its colour, marker and dashes.

    A model's colour is that of its variant where all models are of different variants. An
    untrained twin has the colour of its model and is dashed.

    Args:
        provenance: Of the tables.
        panels: What is shown.

    Returns:
        Keywords of `Axes.plot`, one each.
    """
    stems = {p.model: untrained_stem(provenance, p.model) for p in panels}
    roots = {model: stem or model for model, stem in stems.items()}
    order = list(dict.fromkeys(roots.values()))
    variant_of = variants(provenance, roots)
    by_variant = _apart_by_variant(variant_of, roots)
    used: dict[tuple[str, bool], int] = {}
    looks = []
    for panel in reversed(panels):  # of several steps, the last has the whole line
        untrained, root = stems[panel.model] is not None, roots[panel.model]
        variant = variant_of[panel.model] if by_variant else None
        look, again = _color_and_marker(variant, order.index(root))
        number = used.get((root, untrained), 0) + again
        used[root, untrained] = number + 1
        look["linestyle"] = "--" if untrained else _PATTERNS[number % len(_PATTERNS)]
        look["markerfacecolor"] = "white" if untrained or number % 2 else look["color"]
        looks.append(look)
    return looks[::-1]


def _apart_by_variant(variant_of: Mapping[str, str | None], roots: Mapping[str, str]) -> bool:
    """Whether each model has a variant that no other has, its untrained twin aside."""
    owners: dict[str | None, set[str]] = {}
    for model, variant in variant_of.items():
        owners.setdefault(variant, set()).add(roots[model])
    return all(variant and len(models) == 1 for variant, models in owners.items())


def _color_and_marker(variant: str | None, place: int) -> tuple[Look, int]:
    """Colour and marker of a variant, or of a place; and how often that place's came before."""
    if variant:
        look = variant_look(variant)
        return {"color": look["color"], "marker": look["marker"]}, 0
    look = {"color": LINES[place % len(LINES)], "marker": MARKERS[place % len(MARKERS)]}
    return look, place // len(LINES)


def draw_course(ax: Axes, course: Course, last: int) -> None:
    """Draw one line with its band: whole up to the trained loops, dotted beyond them.

    Args:
        ax: Where to draw.
        course: The line.
        last: The last t that belongs to the trained loops; its marker is larger.
    """
    rows = course.rows[course.rows["n"] > 0]
    t, mean = rows["t"].to_numpy(), rows["mean"].to_numpy()
    ax.fill_between(
        t, rows["low"], rows["high"], color=course.look["color"], alpha=0.13, linewidth=0
    )
    trained = t <= last
    step = max(1, -(-int(trained.sum()) // MARKED))
    dotted = course.look | {"linestyle": ":", "marker": "none"}
    ax.plot(t[~trained | (t == last)], mean[~trained | (t == last)], label="_more", **dotted)
    ax.plot(
        t[trained], mean[trained], label=course.title, markersize=3.0, markevery=step,
        markeredgewidth=0.7, **course.look,
    )  # fmt: skip
    if trained.any() and t[trained][-1] == last:
        end = course.look | {"linestyle": "none"}
        ax.plot(
            t[trained][-1:], mean[trained][-1:], label="_end", markersize=5.5, markeredgewidth=0.9,
            zorder=3, **end,
        )  # fmt: skip


def line_page(
    titles: Sequence[str], panels: int = 1, height: float = 2.1, rows: int = 1
) -> tuple[Figure, list[Axes], int]:
    """Make a figure of axes beside each other, of one y-axis, with room for a legend above them.

    Args:
        titles: What the legend lists.
        panels: How many axes: one is a column wide, several share a page.
        height: Inches of the axes.
        rows: Rows of such axes, each with a y-axis of its own.

    Returns:
        The figure, its axes row by row, and how many columns the legend has.
    """
    width = min(PAGE_WIDTH, WIDTH * panels)
    letters = max(len(line) for title in titles for line in title.split("\n"))
    most = 4 if panels == 1 else 6
    columns = max(1, min(most, len(titles), int(width // (0.42 + 0.062 * letters))))
    columns = -(-len(titles) // -(-len(titles) // columns))  # rows of equal length
    lines = 0
    for start in range(0, len(titles), columns):
        lines += max(title.count("\n") + 1 for title in titles[start : start + columns])
    heads = 0.3 if panels > 1 else 0.0
    fig = new_figure(width, rows * height + 0.55 + 0.135 * lines + heads)
    axes = fig.subplots(rows, panels, sharex=rows > 1, sharey="row", squeeze=False)
    return fig, list(axes.flat), columns


def head_panel(ax: Axes, title: str, meaning: str) -> None:
    """Write above one of several panels what it shows, in small print what that is.

    Args:
        ax: The panel.
        title: A word.
        meaning: A line.
    """
    ax.set_title(title, fontsize=NORMAL, pad=11)
    ax.annotate(
        meaning, (0.5, 1.0), (0.0, 3.0), xycoords="axes fraction", textcoords="offset points",
        ha="center", va="bottom", fontsize=SMALL - 0.5, color=GREY,
    )  # fmt: skip


def add_legend(fig: Figure, lines: Sequence[Course], columns: int) -> None:
    """Add the one legend of a figure.

    Args:
        fig: The figure.
        lines: A line of each model, drawn or without a sound value.
        columns: Columns of the legend.
    """
    # matplotlib fills a legend by columns; order it so that it reads by rows
    ordered = [course for column in range(columns) for course in lines[column::columns]]
    fig.legend(
        [legend_line(course.look) for course in ordered], [course.title for course in ordered],
        loc="outside upper center", ncols=columns, columnspacing=1.2, handlelength=2.4,
    )  # fmt: skip


def finish_axes(axes: Sequence[Axes], by_axes: Sequence[Sequence[Course]]) -> None:
    """Give each t-axis its range and whole numbers.

    Args:
        axes: The panels.
        by_axes: The lines of each, drawn or without a sound value.
    """
    for ax, lines in zip(axes, by_axes, strict=True):
        times = pd.concat([course.rows["t"] for course in lines])
        first, last = int(times.min()), int(times.max())
        ax.set_xticks(every(first, last, _LABELS if len(axes) == 1 else _FEW_LABELS))
        ax.set_xlim(first - 0.03 * max(last - first, 1), last + 0.03 * max(last - first, 1))
        ax.grid(axis="y")


def legend_line(look: Look) -> Line2D:
    """Make a line for a legend, of any model, whether it has a value or not.

    Args:
        look: Keywords of `Axes.plot`.

    Returns:
        The line, with no points.
    """
    return Line2D([], [], markersize=3.0, markeredgewidth=0.7, **look)


def course_note(lines: Sequence[Course], ends: Sequence[int]) -> str:
    """Say what the large markers and the dotted and dashed lines are.

    Args:
        lines: The lines.
        ends: The last t of each that belongs to the trained loops.

    Returns:
        The sentences.
    """
    sentences = ["Lines: mean over samples, bands: its 95 % interval."]
    more = [c.rows["t"].max() > end for c, end in zip(lines, ends, strict=True) if len(c.rows)]
    sentences.append("Large markers: the last of the loops that the model runs by itself.")
    if any(more):
        sentences.append("Dotted: more loops than that.")
    if any(c.look["linestyle"] == "--" for c in lines):
        sentences.append("Dashed: untrained.")
    return " ".join(sentences)


def lacking_note(by_panel: Mapping[str, Sequence[Course]]) -> str:
    """Say which lines of a figure are not in each of its panels.

    Args:
        by_panel: The lines of each panel by its title, in the same order in each.

    Returns:
        Sentences such as 'No fitted values: base.'; empty where every line is everywhere, or
        nowhere.
    """
    anywhere = [any(lines) for lines in zip(*_soundness(by_panel), strict=True)]
    sentences = []
    for title, lines in by_panel.items():
        names = [
            shortened(course.panel.title, _LETTERS)
            for course, elsewhere in zip(lines, anywhere, strict=True)
            if elsewhere and not course.sound
        ]
        if names:
            sentences.append(f"No {title} values: {', '.join(names)}.")
    return " ".join(sentences)


def _soundness(by_panel: Mapping[str, Sequence[Course]]) -> list[list[bool]]:
    return [[course.sound for course in lines] for lines in by_panel.values()]
