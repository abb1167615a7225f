"""Router maps of a MeSH model: which slots are written and read, step by step."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize

from loopscope.analysis import aggregate
from loopscope.analysis.tables import Tables
from loopscope.errors import InputError
from loopscope.figures.names import block_order, source_label, state_label, step_label
from loopscope.figures.notes import note, options_note, samples_note
from loopscope.figures.panels import Panel, choose_one, need, say_unsound
from loopscope.figures.router_tokens import draw_tokens, token_rows
from loopscope.figures.style import (
    GREY,
    PAGE_WIDTH,
    SMALL,
    TINY,
    Figure,
    cell_text,
    heat_map,
    new_figure,
    style,
)

WIDE = 9
"""Slots whose mean weights can be printed as decimals; more are printed in percent."""

_CELL = 0.165  # inches per row of a map


class Map(NamedTuple):
    """A matrix of mean weights: loop step (or state) × slot (or source)."""

    values: pd.DataFrame
    entropy: pd.Series | None
    flagged: int


def routers(tables: Tables, model: str) -> Figure:
    """Draw where a model writes and reads, what each state is made of, and one text in detail.

    Write and read maps hold the mean weights of MeSH Eq. 3 per step and slot, the transition
    first; the entropy of the weights (nats, mean over tokens) stands at each row's end. The third
    map holds the mean alpha of MeSH Eq. 7: how much of each source is in each state. Below, the
    weights of the first text token by token.

    Args:
        tables: What was measured; needs `routing`, shows `tokens` where present.
        model: The model's name.

    Returns:
        The figure.

    Raises:
        InputError: if the table is missing, the model is not in it or has no memory slots, or the
            table holds several steps or loops of it.
    """
    frame = need(tables, "routing")
    panel = choose_one(frame, model, "routing")
    stats = panel.rows(aggregate.routing(frame[frame["model"].eq(model)]))
    write, read = router_map(stats, "write"), router_map(stats, "read")
    if write.values.empty or read.values.empty:
        raise InputError(
            f"{model!r} has no router weights in the table 'routing': it has no memory slots. "
            "Router figures exist for models of variant mesh."
        )
    alpha = router_map(stats, "alpha")
    rows = token_rows(tables.tokens, panel)
    with style():
        slots = write.values.shape[1]
        fig = _draw(panel, write, read, alpha, rows)
        note(
            fig,
            f"Numbers: mean weight over tokens and samples{' in %' if slots > WIDE else ''}; "
            "H: entropy of the weights in nats, "
            f"uniform over {slots} slots would be {np.log(slots):.2f}.",
            samples_note(frame[frame["model"].eq(model)], [panel], "mean"),
            options_note(tables, [panel], "routing"),
            "Bottom: first sample, weights token by token."
            if rows
            else "No token-by-token table was measured.",
        )
    return fig


def router_map(stats: pd.DataFrame, kind: str) -> Map:
    """Turn one model's routing statistics into a matrix.

    Args:
        stats: This model's rows of `aggregate.routing`.
        kind: `write`, `read` or `alpha`.

    Returns:
        t × target in order, NaN where a target does not exist at that step; entropy per t
        (None for alpha); how many weights were left out.
    """
    part = stats[stats["kind"].eq(kind)].assign(target=lambda f: f["target"].astype(str))
    values = part.pivot(index="t", columns="target", values="mean").sort_index()
    values = values[_target_order(values.columns)]
    entropy = None if kind == "alpha" else part.groupby("t")["entropy"].mean()
    return Map(values, entropy, int(part["n_flagged"].sum()))


def _target_order(targets: pd.Index) -> list[str]:
    slots = [t for t in targets if t[:1] == "m" and t[1:].isdigit()]
    others = block_order(t for t in targets if t not in slots)
    return [*sorted(slots, key=lambda t: int(t[1:])), *others]


def _draw(panel: Panel, write: Map, read: Map, alpha: Map, rows: list) -> Figure:
    slots = write.values.shape[1]
    steps = max(len(write.values), len(alpha.values))
    band = 0.0
    if rows:
        lines = sum(len(step.weights) for step in rows[0].steps)
        band = min(0.075 * lines, 4.2) + 0.2
    top = _CELL * steps + 0.75
    fig = new_figure(PAGE_WIDTH, top + 2 * band + (1.2 if rows else 0.55))
    columns = [m.values.shape[1] for m in (write, read, alpha) if not m.values.empty]
    grid = fig.add_gridspec(
        3 if rows else 1,
        len(columns),
        height_ratios=[top, band, band] if rows else [1],
        width_ratios=[c + 2 for c in columns],
    )
    norm = Normalize(0.0, 1.0)
    axes = [fig.add_subplot(grid[0, column]) for column in range(len(columns))]
    mesh = _draw_map(axes[0], write, norm, "write weights", slots)
    _draw_map(axes[1], read, norm, "read weights", slots)
    if not alpha.values.empty:
        _draw_map(axes[2], alpha, norm, r"sources of each state, $\alpha$ (Eq. 7)", slots)
    for place, row in enumerate(rows, start=1):
        ax = fig.add_subplot(grid[place, :])
        draw_tokens(ax, row, norm, show_tokens=place == len(rows))
        axes.append(ax)
    bar = fig.colorbar(
        mesh, ax=axes, aspect=30 if rows else 15, pad=0.01, fraction=0.03, anchor=(0.0, 1.0)
    )
    bar.set_label("weight")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)
    fig.suptitle(panel.title, fontsize=8.5)
    return fig


def _draw_map(ax: Axes, drawn: Map, norm: Normalize, title: str, slots: int) -> QuadMesh:
    values = drawn.values.to_numpy(dtype=np.float64)
    mesh = heat_map(ax, np.ma.masked_invalid(values), norm)
    percent = slots > WIDE
    cell_text(ax, values, norm, size=TINY - 0.5 * percent, percent=percent)
    if not np.isfinite(values).any():
        say_unsound(ax, drawn.flagged)
    steps = [int(t) for t in drawn.values.index]
    if drawn.entropy is None:
        rows = [state_label(f"h{t + 1}") for t in steps]
        targets = [source_label(s) for s in drawn.values.columns]
    else:
        rows = [step_label(t) for t in steps]
        targets = [str(s) for s in drawn.values.columns]
        edge = values.shape[1] + 0.15
        ax.text(edge, -0.12, "H", fontsize=SMALL, color=GREY, va="bottom")
        for row, t in enumerate(steps):
            ax.text(
                edge,
                row + 0.5,
                f"{drawn.entropy[t]:.2f}" if np.isfinite(drawn.entropy[t]) else "n/a",
                fontsize=TINY,
                color=GREY,
                va="center",
            )
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows)
    ax.set_xticks(
        np.arange(len(targets)) + 0.5,
        targets,
        rotation=90 if drawn.entropy is None or percent else 0,
    )
    ax.set_title(title)
    return mesh
