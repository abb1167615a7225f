"""What one panel shows, how panels share a page, and what a figure says of its samples."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from loopscope.analysis import aggregate
from loopscope.analysis.tables import Tables
from loopscope.errors import InputError, unknown_name
from loopscope.figures.names import model_label
from loopscope.figures.style import GREY, PAGE_WIDTH, SMALL, Figure, new_figure

TABLES = ("update", "cka", "spectrum", "rank", "routing", "tokens", "loss")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One model at one training step, seen through one of its loops.

    Attributes:
        model: Name in the tables.
        step: Training step, or None when the table is no series.
        loop: Name of the loop.
        title: What the panel is called in the figure.
    """

    model: str
    step: int | None
    loop: str
    title: str

    def rows(self, stats: pd.DataFrame) -> pd.DataFrame:
        """Select this panel's rows of an aggregated (or measured) table."""
        step = stats["step"].isna() if self.step is None else stats["step"].eq(self.step)
        here = stats["model"].eq(self.model) & stats["loop"].eq(self.loop) & step.fillna(False)
        return stats[here.astype(bool)]


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
        there = [n for n in TABLES if (t := getattr(tables, n)) is not None and len(t) > 0]
        raise InputError(
            f"this figure needs the table {name!r}, which was not measured; there "
            f"{'is' if len(there) == 1 else 'are'}: {', '.join(there) or 'none'}. "
            f"Measure again with {name!r} among the measures."
        )
    return frame


def all_models(tables: Tables) -> list[str]:
    """List every model that any table holds, in order of first appearance.

    Args:
        tables: What was measured.

    Returns:
        The names.
    """
    frames = [f for n in TABLES if (f := getattr(tables, n)) is not None]
    return list(dict.fromkeys(str(m) for f in frames for m in f["model"].unique()))


def choose(frame: pd.DataFrame, models: Sequence[str] | str | None, table: str) -> list[Panel]:
    """List the panels of a figure: one per model, and per step and loop where there are several.

    Args:
        frame: A measured table.
        models: Names in the order wanted; None takes all in the table's order.
        table: The table's name, for the message.

    Returns:
        The panels.

    Raises:
        UnknownNameError: if a model is not in the table.
        InputError: if no model is asked for.
    """
    cases = frame[aggregate.KEYS].drop_duplicates()
    there = [str(m) for m in cases["model"].unique()]
    wanted = there if models is None else [models] if isinstance(models, str) else list(models)
    if not wanted:
        raise InputError(f"no model was asked for; the table {table!r} holds: {', '.join(there)}.")
    panels = []
    for model in dict.fromkeys(wanted):
        if model not in there:
            raise unknown_name(
                "model", model, there, hint=f"The table {table!r} holds: {', '.join(there)}."
            )
        own = cases[cases["model"].eq(model)]
        for step, loop in zip(own["step"], own["loop"], strict=True):
            title = model_label(model)
            if own["loop"].nunique() > 1:
                title += f", {loop}"
            if not pd.isna(step):
                title += f", step {step:,}"
            panels.append(
                Panel(
                    model=model,
                    step=None if pd.isna(step) else int(step),
                    loop=str(loop),
                    title=title,
                )
            )
    return panels


def choose_one(frame: pd.DataFrame, model: str, table: str) -> Panel:
    """Get the only panel of a model.

    Args:
        frame: A measured table.
        model: Its name.
        table: The table's name, for the message.

    Returns:
        The panel.

    Raises:
        UnknownNameError: if the model is not in the table.
        InputError: if the table holds several steps or loops of it.
    """
    panels = choose(frame, model, table)
    if len(panels) > 1:
        raise InputError(
            f"this figure shows one state of a model, but the table {table!r} holds "
            f"{len(panels)} of {model!r}: {'; '.join(p.title for p in panels)}. "
            "Select the rows of one step and loop first."
        )
    return panels[0]


class Page(NamedTuple):
    """A figure with its panels."""

    fig: Figure
    axes: list[Axes]
    rows: int
    columns: int

    @property
    def leftmost(self) -> list[Axes]:
        """The first panel of each row."""
        return self.axes[:: self.columns]


def page(
    panels: Sequence[Panel],
    *,
    width: float,
    height: float,
    extra: float = 0.6,
    widest: int = 6,
    **share: Any,
) -> Page:
    """Lay panels out in rows of equal length on a page's width, each with its title.

    Args:
        panels: What is shown.
        width: Inches that a panel needs; fewer share a row when they are wide.
        height: Inches of a panel.
        extra: Inches for what surrounds the panels (legend, notes, colour bar).
        widest: Panels per row at most.
        **share: `sharex`, `sharey` of `Figure.subplots`.

    Returns:
        The page; call inside `style()`.
    """
    fit = max(1, min(widest, int(PAGE_WIDTH // width)))
    rows = math.ceil(len(panels) / fit)
    columns = math.ceil(len(panels) / rows)
    total = min(PAGE_WIDTH, max(3.3, width * columns * 1.15 + 0.5))
    fig = new_figure(total, rows * height + extra)
    grid = fig.subplots(rows, columns, squeeze=False, **share)
    axes = list(grid.flat)
    for empty in axes[len(panels) :]:
        empty.remove()
    axes = axes[: len(panels)]
    letters = int((total - 0.5) / columns * 72 / (SMALL * 0.68))
    for ax, panel in zip(axes, panels, strict=True):
        ax.set_title(wrapped(panel.title, letters))
    return Page(fig, axes, rows, columns)


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


def note(fig: Figure, *sentences: str) -> None:
    """Write small print under a figure: what was drawn, from how many samples.

    Args:
        fig: The figure.
        *sentences: The parts; empty ones are skipped.
    """
    size = SMALL - 0.5
    text = " ".join(s for s in sentences if s).replace("n = ", "n\u00a0=\u00a0")
    lines = textwrap.wrap(text, int(fig.get_figwidth() * 72 / (size * 0.53)))
    text = "\n".join(lines).replace("\u00a0", " ")
    fig.supxlabel(text, x=0.01, ha="left", fontsize=size, color=GREY, linespacing=1.25)


def samples_note(frame: pd.DataFrame, panels: Sequence[Panel], column: str = "value") -> str:
    """Say how many samples a figure rests on and how many flagged values were left out.

    Args:
        frame: The measured table, only the rows that are drawn.
        panels: What is shown.
        column: The column that is averaged.

    Returns:
        Sentences such as 'n = 500 samples. Left out as flagged: +mesh 3 values in 2 samples.'
    """
    counts = aggregate.left_out(frame, column)
    found = [(p.title, _Left.of(p, counts)) for p in panels]
    ns = {title: left.samples for title, left in found}
    if len(set(ns.values())) == 1:
        text = f"n = {next(iter(ns.values()))} samples{' each' if len(ns) > 1 else ''}."
    else:
        text = f"n samples: {', '.join(f'{title} {n}' for title, n in ns.items())}."
    return text + _flagged_text(found)


def combined_note(panel: Panel, parts: dict[str, tuple[pd.DataFrame, str]]) -> str:
    """Say how many samples a figure of several tables rests on, and what was left out where.

    Args:
        panel: What is shown.
        parts: Name of a part of the figure → its measured table and the averaged column.

    Returns:
        Sentences such as 'n = 500 samples. Left out as flagged: (b) 3 values in 2 samples.'
    """
    found = [
        (name, _Left.of(panel, aggregate.left_out(panel.rows(frame), column)))
        for name, (frame, column) in parts.items()
    ]
    ns = {name: left.samples for name, left in found}
    if len(set(ns.values())) == 1:
        text = f"n = {next(iter(ns.values()))} samples."
    else:
        text = f"n samples: {', '.join(f'{name} {n}' for name, n in ns.items())}."
    return text + _flagged_text(found)


@dataclass(frozen=True)
class _Left:
    samples: int
    flagged_values: int
    flagged_samples: int

    @classmethod
    def of(cls, panel: Panel, counts: pd.DataFrame) -> "_Left":
        names = ["samples", "flagged_values", "flagged_samples"]
        return cls(*(int(v) for v in panel.rows(counts)[names].sum()))


def _flagged_text(found: Sequence[tuple[str, _Left]]) -> str:
    flagged = [
        f"{name} {_count(left.flagged_values, 'value')} in {_count(left.flagged_samples, 'sample')}"
        for name, left in found
        if left.flagged_values > 0
    ]
    return f" Left out as flagged: {', '.join(flagged)}." if flagged else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
