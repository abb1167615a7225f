"""How many directions each state uses: effective rank along the loop."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from loopscope.analysis.tables import Tables, aggregate
from loopscope.errors import unknown_name
from loopscope.figures.courses import Look, line_looks
from loopscope.figures.names import state_label
from loopscope.figures.notes import note, options_note, samples_note, states_note
from loopscope.figures.panels import Panel, choose, need, say_unsound, unsound_text, wrapped
from loopscope.figures.style import Figure, new_figure, style
from loopscope.figures.ticks import labelled, spread_ends
from loopscope.names import state_order

_MEASURES = {
    "effective": "effective rank",
    "stable": "stable rank",
    "participation": "participation ratio",
}

_WIDEST = 6.0  # inches; in more states than fit there, some have a label


def rank(
    tables: Tables, models: Sequence[str] | str | None = None, measure: str = "effective"
) -> Figure:
    """Draw the rank of each state, one line per model; whiskers are standard deviations.

    Effective rank is exp(−Σ p log p) with p = σ/Σσ (Roy & Vetterli 2007).

    Args:
        tables: What was measured; needs `rank`.
        models: Names in the order of the legend; None takes all.
        measure: `effective`, `stable` or `participation`.

    Returns:
        The figure.

    Raises:
        InputError: if the table is missing, or a model or measure is not in it.
    """
    frame = need(tables, "rank")
    measured = [str(m) for m in frame["measure"].unique()]
    if measure not in measured:
        raise unknown_name("measure", measure, measured)
    frame = frame[frame["measure"].eq(measure)]
    panels = choose(tables, frame, models, "rank")
    stats = aggregate.means(frame, "rank")
    parts = [p.rows(stats) for p in panels]
    order = state_order(str(s) for p in parts for s in p["state"])
    looks = line_looks(tables.provenance, panels)
    with style():
        titles = [_title(p, part) for p, part in zip(panels, parts, strict=True)]
        fig = _page(len(order), titles)
        ax = fig.subplots()
        for number, part in enumerate(parts):
            dodge = 0.0 if len(panels) == 1 else 0.4 * (number / (len(panels) - 1) - 0.5)
            _draw_line(ax, part, order, dodge, label=titles[number], look=looks[number])
        _name_states(ax, order)
        if not any(p["n"].any() for p in parts):
            say_unsound(ax, sum(int(p["n_flagged"].sum()) for p in parts))
            ax.set_ylim(0, 1)
        ax.set_ylim(bottom=0)
        ax.set_ylabel(_MEASURES.get(measure, measure))
        ax.grid(axis="y")
        fig.legend(loc="outside right center")
        note(
            fig,
            "Markers: mean, whiskers: ±1 SD over samples.",
            states_note(panels),
            samples_note(frame, panels),
            options_note(tables, panels, "rank"),
        )
    return fig


def _title(panel: Panel, part: pd.DataFrame) -> str:
    title = wrapped(panel.title, 26)
    return title if part["n"].any() else f"{title}:\n{unsound_text(int(part['n_flagged'].sum()))}"


def _page(states: int, titles: Sequence[str]) -> Figure:
    """An empty figure with room for a legend of the titles beside the axes."""
    letters = max(len(line) for title in titles for line in title.split("\n"))
    beside = 0.9 + 0.06 * letters
    lines = sum(title.count("\n") + 1 for title in titles)
    return new_figure(max(3.4, min(0.34 * states, _WIDEST) + beside), max(2.5, 0.9 + 0.125 * lines))


def _draw_line(
    ax: Axes, part: pd.DataFrame, order: list[str], dodge: float, *, label: str, look: Look
) -> None:
    # States that a model lacks stay NaN: no line runs across them.
    rows = part.set_index(part["state"].astype(str)).reindex(order)
    ax.errorbar(
        np.arange(len(order)) + dodge,
        rows["mean"].to_numpy(),
        yerr=rows["std"].to_numpy(),
        label=label,
        **look,
        markersize=3.2,
        elinewidth=0.7,
        capsize=1.5,
        capthick=0.7,
    )


def _name_states(ax: Axes, order: Sequence[str]) -> None:
    shown = labelled(order, int(_WIDEST / 0.34) - 2)
    ax.set_xticks([order.index(s) for s in shown], [state_label(s) for s in shown])
    if len(shown) < len(order):
        spread_ends(ax.get_xticklabels(), ha=("right", "left"))
    ax.set_xlim(-0.5, len(order) - 0.5)
