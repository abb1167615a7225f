"""Figure 5 of the MeSH paper: how fast the singular values of each state decay."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from loopscope.analysis.tables import Tables, aggregate
from loopscope.figures.names import state_label
from loopscope.figures.notes import note, options_note, samples_note, states_note
from loopscope.figures.panels import Page, choose, need, page, say_unsound
from loopscope.figures.style import GREY, HEAT, VERMILLION, Figure, style
from loopscope.figures.ticks import labelled
from loopscope.names import state_order

SPECTRUM_LABEL = r"$\sigma_i\,/\,\sigma_0$"
BAND_NOTE = (
    r"Lines: mean, bands: ±1 SD over samples, both of $\log_{10}(\sigma_i/\sigma_0)$, "
    "up to where 95 % of the samples have a value."
)
Look = dict[str, Any]
LISTED = 16
"""States of a loop that a legend lists; of more it lists some."""

_FLOOR = -16.0  # log10; float64 resolves nothing below
_COMPLETE = 0.95  # share of the samples that must have a value


def spectrum(tables: Tables, models: Sequence[str] | str | None = None) -> Figure:
    """Draw the leading singular values of each state, one panel per model (MeSH Figs. 1c, 5).

    Line and band are mean and standard deviation over samples of log10(sigma_i / sigma_0).

    Args:
        tables: What was measured; needs `spectrum`.
        models: Names in the order of the panels; None takes all.

    Returns:
        The figure.

    Raises:
        InputError: if the table is missing or a model is not in it.
    """
    frame = need(tables, "spectrum")
    panels = choose(tables, frame, models, "spectrum")
    stats = aggregate.means(frame, "spectrum")
    parts = [p.rows(stats) for p in panels]
    states = state_order(str(s) for p in parts for s in p["state"].unique())
    looks = state_looks(states)
    with style():
        sheet = page(panels, width=1.6, height=1.65, extra=0.75, widest=4, sharey=True)
        for ax, part in zip(sheet.axes, parts, strict=True):
            draw_spectrum(ax, part, looks)
            ax.set_xlabel("index $i$")
        for ax in sheet.leftmost:
            ax.set_ylabel(SPECTRUM_LABEL)
        _add_legend(sheet, states)
        note(
            sheet.fig,
            BAND_NOTE,
            samples_note(frame, panels, "log10_sigma_rel"),
            legend_note(states),
            states_note(panels),
            options_note(tables, panels, "spectrum"),
        )
    return sheet.fig


def _add_legend(sheet: Page, states: Sequence[str]) -> None:
    """List the drawn states above the panels."""
    handles = {line.get_label(): line for ax in sheet.axes for line in ax.get_lines()}
    shown = labelled(states, LISTED)
    labels = [label for s in shown if (label := state_label(s)) in handles]
    rows = math.ceil(len(labels) * 0.58 / sheet.fig.get_figwidth())
    columns = math.ceil(len(labels) / max(rows, 1))
    # matplotlib fills a legend by columns; order it so that it reads by rows.
    labels = [label for column in range(columns) for label in labels[column::columns]]
    if labels:
        sheet.fig.legend(
            [handles[label] for label in labels],
            labels,
            loc="outside upper center",
            ncols=columns,
            columnspacing=1.0,
            handlelength=2.2,
        )


def state_looks(states: Sequence[str]) -> dict[str, Look]:
    """Give each state its line: h(0) … h(K) from dark to light, the two ends apart from them.

    Args:
        states: Names in order.

    Returns:
        state → keywords of `Axes.plot`.
    """
    loop = [s for s in states if s not in ("h_emb", "h_out")]
    shades = colormaps[HEAT](np.linspace(0.0, 0.83, max(len(loop), 2)))
    looks: dict[str, Look] = {
        "h_emb": {"color": GREY, "linestyle": (0, (4, 1.5))},
        "h_out": {"color": VERMILLION, "linestyle": (0, (5, 1.2, 1, 1.2))},
    }
    for state, shade in zip(loop, shades, strict=False):
        looks[state] = {"color": to_hex(shade), "linestyle": "-"}
    return {state: looks[state] for state in states}


def legend_note(states: Sequence[str]) -> str:
    """Say that the legend lists some of the states only.

    Args:
        states: All that are drawn.

    Returns:
        The sentence, empty where all are listed.
    """
    if len(labelled(states, LISTED)) == len(states):
        return ""
    return "The legend lists some of the states; their colours run from dark to light."


def draw_spectrum(ax: Axes, part: pd.DataFrame, looks: dict[str, Look]) -> None:
    """Draw one model's lines and bands, or say that it has no sound value.

    Args:
        ax: Where to draw.
        part: This model's rows of `aggregate.spectrum`.
        looks: state → line style, from `state_looks`.
    """
    ax.set_xlim(0, max([1, *part["i"]]))
    ax.grid(axis="y")
    if not part["n"].any():
        say_unsound(ax, int(part["n_flagged"].sum()))
        return
    for state, rows in sorted(
        part.groupby(part["state"].astype(str), sort=False), key=lambda p: list(looks).index(p[0])
    ):
        # past this, a mean over the few samples that still have a value would turn upwards
        complete = rows["n"] >= max(1, _COMPLETE * rows["n"].max())
        drawn = rows[complete].sort_values("i")
        if drawn.empty:
            continue
        i, mean = drawn["i"].to_numpy(), drawn["mean"].to_numpy()
        spread = drawn["std"].fillna(0.0).to_numpy()
        ax.fill_between(
            i,
            10.0 ** np.maximum(mean - spread, _FLOOR),
            10.0 ** (mean + spread),
            color=looks[state]["color"],
            alpha=0.2 if len(looks) <= 2 * LISTED else 0.1,
            linewidth=0,
        )
        ax.plot(i, 10.0**mean, label=state_label(state), **looks[state])
    ax.set_yscale("log")
