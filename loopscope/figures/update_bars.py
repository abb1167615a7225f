"""Figure 3 of the MeSH paper: how much each block changes the state."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from loopscope.analysis.tables import Tables, aggregate
from loopscope.figures.names import block_label
from loopscope.figures.notes import note, options_note, paths_note, samples_note
from loopscope.figures.panels import choose, need, page, say_unsound
from loopscope.figures.style import BLUE, GREY, INK, SMALL, TINY, Figure, style
from loopscope.figures.ticks import labelled, spread_ends
from loopscope.names import block_number, block_order

UPDATE_LABEL = "2‖f(h)−h‖ / (‖f(h)‖+‖h‖)"
MANY = 20
"""Bars with thinner whiskers, and labels for some of them, above this number."""

_OUTER = "#A9B4BC"
_LABEL = 0.1  # inches that a label on its side needs


def update(tables: Tables, models: Sequence[str] | str | None = None) -> Figure:
    """Draw the relative update of each block, one panel per model (MeSH Figs. 1a, 3).

    Bars are means over samples of 2·||f(h) − h||_F / (||f(h)||_F + ||h||_F), whiskers standard
    deviations (ddof = 1).

    Args:
        tables: What was measured; needs `update`.
        models: Names in the order of the panels; None takes all.

    Returns:
        The figure.

    Raises:
        InputError: if the table is missing or a model is not in it.
    """
    frame = need(tables, "update")
    panels = choose(tables, frame, models, "update")
    stats = aggregate.means(frame, "update")
    parts = [p.rows(stats) for p in panels]
    bars = max(len(p) for p in parts)
    with style():
        sheet = page(
            panels, width=max(1.6, 0.5 + 0.105 * bars), height=2.05, extra=0.3, sharey=True
        )
        inches = (sheet.fig.get_figwidth() - 0.6) / sheet.columns
        for ax, panel, part in zip(sheet.axes, panels, parts, strict=True):
            draw_update(ax, part, panel.paths, most=int(inches / _LABEL), room=0.4 * bars)
        top = max((_highest(p) for p in parts), default=1.0)
        sheet.axes[0].set_ylim(0, top * 1.06)
        for ax in sheet.leftmost:
            ax.set_ylabel(UPDATE_LABEL)
        note(
            sheet.fig,
            "Bars: mean, whiskers: ±1 SD over samples of the relative update of each block f.",
            paths_note(panels),
            samples_note(frame, panels),
            options_note(tables, panels, "update"),
        )
    return sheet.fig


def draw_update(
    ax: Axes,
    part: pd.DataFrame,
    paths: Sequence[str] = (),
    *,
    most: int = MANY,
    room: float = 4.0,
) -> None:
    """Draw one model's bars, or say that it has no sound value.

    Args:
        ax: Where to draw.
        part: This model's rows of `aggregate.update`.
        paths: Where each iteration stands in nested loops.
        most: Labels of iterations for which there is room.
        room: Bars that the panel is wide, if there are not more.
    """
    order = block_order(str(b) for b in part["block"])
    rows = part.set_index(part["block"].astype(str)).loc[order]
    thick, cap = (0.8, 1.8) if len(order) <= MANY else (0.6, 1.0)
    ax.bar(
        range(len(order)),
        rows["mean"].to_numpy(),
        yerr=rows["std"].to_numpy(),
        width=0.72,
        color=[_OUTER if block_number(b) is None else BLUE for b in order],
        error_kw={"elinewidth": thick, "capsize": cap, "capthick": thick, "ecolor": INK},
    )
    if not rows["n"].any():
        say_unsound(ax, int(rows["n_flagged"].sum()))
    for x, n in enumerate(rows["n"]):
        # all samples flagged, such as a block that changes the width
        if n == 0 and rows["n"].any():
            ax.text(x, 0, " n/a", rotation=90, ha="center", va="bottom", fontsize=SMALL, color=GREY)
    middle, half = (len(order) - 1) / 2, max(len(order), room, 4) / 2 + 0.1
    ax.set_xlim(middle - half, middle + half)
    _name_blocks(ax, order, paths, most)
    ax.grid(axis="y")


def _name_blocks(ax: Axes, order: Sequence[str], paths: Sequence[str], most: int) -> None:
    shown = labelled(order, most)
    ax.set_xticks([order.index(b) for b in shown], [block_label(b, paths) for b in shown])
    ax.tick_params(axis="x", length=0, pad=2)
    turn = 45 if len(order) <= 6 else 90
    for label in ax.get_xticklabels():
        label.set(rotation=turn, ha="right", va="center" if turn == 90 else "top")
        label.set_rotation_mode("anchor")
        label.set_fontsize(SMALL if len(order) <= 10 else TINY)
    if len(shown) < len(order):  # turned about their ends, labels move sideways by va
        spread_ends(ax.get_xticklabels(), va=("bottom", "top"))


def _highest(part: pd.DataFrame) -> float:
    tops = (part["mean"] + part["std"].fillna(0.0)).max()
    return float(tops) if tops == tops and tops > 0 else 1.0
