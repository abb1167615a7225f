"""What one panel shows, and how panels share a page."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from loopscope.analysis.tables import SCHEMAS, TABLES, Tables, model_record
from loopscope.errors import InputError, unknown_name
from loopscope.figures.names import model_label, printable
from loopscope.figures.style import GREY, PAGE_WIDTH, SMALL, Figure, new_figure
from loopscope.names import KEYS


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One model at one training step, seen through one of its loops.

    Attributes:
        model: Name in the tables.
        step: Training step, or None when the table is no series.
        loop: Name of the loop.
        title: What the panel is called in the figure.
        paths: Where each iteration stands, such as `H0.L2`; empty where their numbers say it.
    """

    model: str
    step: int | None
    loop: str
    title: str
    paths: tuple[str, ...] = ()

    def rows(self, stats: pd.DataFrame) -> pd.DataFrame:
        """Select this panel's rows of an aggregated (or measured) table.

        Args:
            stats: With the columns model, step and loop.

        Returns:
            The rows of its model, step and loop.
        """
        step = stats["step"].isna() if self.step is None else stats["step"].eq(self.step)
        belongs = stats["model"].eq(self.model) & stats["loop"].eq(self.loop) & step.fillna(False)
        return stats[belongs.astype(bool)]


def need(tables: Tables, name: str) -> pd.DataFrame:
    """Get a table that a figure cannot do without.

    Args:
        tables: What was measured.
        name: The table's name.

    Returns:
        The table, not empty.

    Raises:
        InputError: if it was not measured or has no rows, naming the tables that exist.
    """
    frame = getattr(tables, name)
    if frame is None or len(frame) == 0:
        held = [n for n in TABLES if (t := getattr(tables, n)) is not None and len(t) > 0]
        raise InputError(
            f"this figure needs the table {name!r}, which was not measured; there "
            f"{'is' if len(held) == 1 else 'are'}: {', '.join(held) or 'none'}. "
            f"Measure again with {name!r} among the measures."
        )
    return frame


def all_models(tables: Tables) -> list[str]:
    """List every model that any table of measures holds, in order of first appearance.

    Args:
        tables: What was measured.

    Returns:
        The names.
    """
    frames = [f for n in SCHEMAS if (f := getattr(tables, n)) is not None]
    return list(dict.fromkeys(str(m) for f in frames for m in f["model"].unique()))


def loops_of(tables: Tables, model: str) -> list[str]:
    """List the loops of a model that any table of measures holds.

    Args:
        tables: What was measured.
        model: The model's name.

    Returns:
        Their names, in order of first appearance.
    """
    frames = [f for n in SCHEMAS if (f := getattr(tables, n)) is not None and "loop" in f]
    columns = [f.loc[f["model"].eq(model), "loop"].unique() for f in frames]
    return list(dict.fromkeys(str(loop) for column in columns for loop in column))


def only_model(frame: pd.DataFrame, model: str | None, table: str) -> str:
    """Get the model of a figure that shows one.

    Args:
        frame: The table.
        model: The name that was given; None where there is but one.
        table: The table's name, for messages.

    Returns:
        The model's name.

    Raises:
        InputError: where none was given and the table holds several.
    """
    held = [str(name) for name in frame["model"].unique()]
    if model is not None or not held:
        return model or ""
    if len(held) > 1:
        raise InputError(
            f"the table {table!r} holds {', '.join(held)}, and this figure shows one model; give "
            "its name."
        )
    return held[0]


def choose(
    tables: Tables, frame: pd.DataFrame, models: Sequence[str] | str | None, table: str
) -> list[Panel]:
    """List the panels of a figure: one per model, and per step and loop where there are several.

    Args:
        tables: What was measured.
        frame: The table to be drawn, or those of its rows that are.
        models: Names in the order wanted; None takes all in the table's order.
        table: The table's name, for the message.

    Returns:
        The panels.

    Raises:
        UnknownNameError: if a model is not in the table.
        InputError: if no model is asked for.
    """
    cases = frame[KEYS].drop_duplicates()
    held = [str(m) for m in cases["model"].unique()]
    names = held if models is None else [models] if isinstance(models, str) else list(models)
    if not names:
        raise InputError(f"no model was asked for; the table {table!r} holds: {', '.join(held)}.")
    panels = []
    for model in dict.fromkeys(names):
        if model not in held:
            raise unknown_name(
                "model", model, held, hint=f"The table {table!r} holds: {', '.join(held)}."
            )
        panels += _panels_of(tables, model, cases[cases["model"].eq(model)])
    return panels


def _panels_of(tables: Tables, model: str, cases: pd.DataFrame) -> list[Panel]:
    """The panels of one model; those of several loops or steps say which in their titles."""
    several = len(loops_of(tables, model)) > 1
    panels = []
    for step, loop in zip(cases["step"], cases["loop"], strict=True):
        title = model_label(model)
        if several:
            title += f", {printable(str(loop))}"
        if not pd.isna(step):
            title += f", step {step:,}"
        panels.append(
            Panel(
                model=model,
                step=None if pd.isna(step) else int(step),
                loop=str(loop),
                title=title,
                paths=_paths(tables, model, str(loop)),
            )
        )
    return panels


def choose_one(
    tables: Tables, frame: pd.DataFrame, model: str, loop: str | None, table: str
) -> Panel:
    """Get the only panel of a model, or of one of its loops.

    Args:
        tables: What was measured.
        frame: The table to be drawn, or those of its rows that are.
        model: Its name.
        loop: The loop; None where there is one.
        table: The table's name, for the message.

    Returns:
        The panel.

    Raises:
        UnknownNameError: if the model or the loop is not in the table.
        InputError: if the table holds several steps, or several loops and none is given.
    """
    panels = choose(tables, frame, model, table)
    loops = list(dict.fromkeys(p.loop for p in panels))
    if loop is not None:
        if loop not in loops:
            raise unknown_name(
                "loop", loop, loops, hint=f"The table {table!r} holds: {', '.join(loops)}."
            )
        panels = [p for p in panels if p.loop == loop]
    elif len(loops) > 1:
        raise InputError(
            f"{model!r} has {len(loops)} loops in the table {table!r}: {', '.join(loops)}; this "
            f"figure shows one. Give loop={loops[0]!r} or another."
        )
    if len(panels) > 1:
        raise InputError(
            f"this figure shows one state of a model, but the table {table!r} holds "
            f"{len(panels)} of {model!r}: {'; '.join(p.title for p in panels)}. "
            "Select the rows of one step first."
        )
    return panels[0]


def _paths(tables: Tables, model: str, loop: str) -> tuple[str, ...]:
    """Where a loop's iterations stand; empty where that is their number or nobody told."""
    return model_record(tables.provenance, model).paths(loop)


class Page(NamedTuple):
    """A figure with its panels, those at the left edge, and its size in panels of unit size."""

    fig: Figure
    axes: list[Axes]
    leftmost: list[Axes]
    rows: int
    columns: int


def page(
    panels: Sequence[Panel],
    *,
    width: float,
    height: float,
    extra: float = 0.6,
    widest: int = 6,
    units: Sequence[int] | None = None,
    **share: Any,
) -> Page:
    """Lay panels out in rows on a page's width, each with its title.

    Args:
        panels: What is shown.
        width: Inches that a panel of unit size needs; fewer share a row when they are wide.
        height: Inches of a panel of unit size.
        extra: Inches for what surrounds the panels (legend, notes, colour bar).
        widest: Panels of unit size per row at most.
        units: Size of each panel, its height and width in units; None makes all alike.
        **share: `sharex`, `sharey` of `Figure.subplots`, for panels that are all alike.

    Returns:
        The page; call inside `style()`.
    """
    sizes = list(units or [1] * len(panels))
    places = pack(sizes, _columns(sizes, max(1, min(widest, int(PAGE_WIDTH // width)))))
    rows = max(row + size for (row, _), size in zip(places, sizes, strict=True))
    columns = max(column + size for (_, column), size in zip(places, sizes, strict=True))
    total = min(PAGE_WIDTH, max(3.3, width * columns * 1.15 + 0.5))
    fig = new_figure(total, rows * height + extra)
    grid = fig.add_gridspec(rows, columns)
    axes: list[Axes] = []
    for panel, (row, column), size in zip(panels, places, sizes, strict=True):
        like = {key: axes[0] for key, shared in share.items() if shared and axes}
        ax = fig.add_subplot(grid[row : row + size, column : column + size], **like)
        if like and column:
            ax.tick_params(labelleft=False)
        letters = int((total - 0.5) / columns * size * 72 / (SMALL * 0.68))
        ax.set_title(wrapped(panel.title, letters))
        axes.append(ax)
    left = [ax for ax, (_, column) in zip(axes, places, strict=True) if column == 0]
    return Page(fig, axes, left, rows, columns)


def _columns(sizes: Sequence[int], most: int) -> int:
    """Units per row: as many as fit, or fewer where panels of one size then fill all rows."""
    if len(set(sizes)) != 1:
        return most
    panels = len(sizes)
    beside = max(1, most // sizes[0])
    return math.ceil(panels / math.ceil(panels / beside)) * sizes[0]


def pack(sizes: Sequence[int], columns: int) -> list[tuple[int, int]]:
    """Place square panels in reading order; each row holds panels of one size.

    Args:
        sizes: Height and width of each panel in units.
        columns: Units per row.

    Returns:
        (row, column) of each panel's upper left corner, in units.
    """
    places = []
    row = column = tall = 0
    for size in sizes:
        if column and (column + size > columns or size != tall):
            row, column = row + tall, 0
        places.append((row, column))
        column, tall = column + size, size
    return places


def unsound_text(flagged: int) -> str:
    """Say that a panel, or a line, has nothing to show.

    Args:
        flagged: Values that were left out.

    Returns:
        'no sound values (1,200 flagged)', on two lines.
    """
    return f"no sound values\n({flagged:,} flagged)"


def say_unsound(ax: Axes, flagged: int) -> None:
    """Write into a panel that every value was left out.

    Args:
        ax: The panel.
        flagged: Values that were left out.
    """
    ax.text(
        0.5,
        0.5,
        unsound_text(flagged),
        transform=ax.transAxes,
        ha="center",
        va="center",
        fontsize=SMALL,
        color=GREY,
        in_layout=False,
    )


def shortened(title: str, letters: int) -> str:
    """Cut a long title (a path) to one line; what is dropped is its beginning.

    Args:
        title: The title.
        letters: Letters that fit.

    Returns:
        The title, or its end after an ellipsis.
    """
    return title if len(title) <= letters else "…" + title[-(letters - 1) :]


def wrapped(title: str, letters: int) -> str:
    """Break a long title (a path) into at most three lines; what is dropped is its beginning.

    Args:
        title: The title.
        letters: Letters that fit on a line.

    Returns:
        The title with line breaks.
    """
    letters = max(letters, 8)
    if len(title) > 3 * letters:
        title = "…" + title[-(3 * letters - 1) :]
    return "\n".join(textwrap.wrap(title, letters, break_on_hyphens=False))
