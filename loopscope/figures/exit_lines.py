"""Early exit: the loss against the mean number of iterations, a curve for each rule."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from scipy.stats import t as student

from loopscope.analysis.tables import Tables, aggregate
from loopscope.figures.courses import trained_loops
from loopscope.figures.notes import note, options_note, samples_note
from loopscope.figures.panels import choose, need, say_unsound, wrapped
from loopscope.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PAGE_WIDTH,
    SMALL,
    TINY,
    Figure,
    new_figure,
    style,
)
from loopscope.figures.ticks import every
from loopscope.names import KEYS

RULES = {
    "step": ("step", BLUE, "o"),
    "acceleration": ("acceleration", ORANGE, "^"),
    "kl": ("KL", GREEN, "s"),
}
"""Rule → its name, colour and marker."""

_FIXED = "loops"
_ROOM = 0.06
_COLUMNS = 4


def early_exit(tables: Tables, models: Sequence[str] | str | None = None) -> Figure:
    """Draw what it costs to let each token stop by a rule, two panels per model.

    A token stops at the first t at which its step, its acceleration, or the divergence of what is
    read from h(t) from what was read before falls below a threshold; its loss is that of the coda
    reading h(t). Every point is a threshold. The grey line is the same number of loops for all
    tokens. The lower panel is the difference from it, on the same samples and at the same mean
    number of iterations: a rule below 0 gains by choosing which tokens go on.

    Args:
        tables: What was measured; needs `early_exit`.
        models: Names in the order of the panels; None takes all.

    Returns:
        The figure.

    Raises:
        InputError: if the table is missing or a model is not in it.
    """
    frame = need(tables, "early_exit")
    panels = choose(tables, frame, models, "early_exit")
    stats = _points(frame)
    gains = _points(_gains(frame), signed=True)
    columns = min(_COLUMNS, len(panels))
    blocks = -(-len(panels) // columns)
    columns = -(-len(panels) // blocks)
    with style():
        fig = new_figure(max(3.4, PAGE_WIDTH * columns / _COLUMNS), blocks * 3.0 + 0.85)
        grid = fig.subplots(2 * blocks, columns, squeeze=False, height_ratios=[1.7, 1.0] * blocks)
        for number, panel in enumerate(panels):
            row, column = divmod(number, columns)
            above, below = grid[2 * row, column], grid[2 * row + 1, column]
            above.set_title(wrapped(panel.title, 24))
            _draw(above, panel.rows(stats), trained_loops(tables, panel))
            _draw_gains(below, panel.rows(gains), above)
            if column == 0:
                above.set_ylabel("loss (nats per token)")
                below.set_ylabel("− fixed loops")
        for empty in range(len(panels), blocks * columns):
            for ax in grid[2 * (empty // columns) : 2 * (empty // columns) + 2, empty % columns]:
                ax.set_axis_off()
        _add_legend(fig, columns)
        note(
            fig,
            "Points: thresholds, the same for all samples. Below: the loss less that of a fixed "
            "number of loops for all tokens (between whole numbers, of some tokens), on the same "
            "samples, with its 95 % interval. Tokens that stop go on for the attention of others.",
            "Numbers at the upper edge: losses beyond it." if any(ax.texts for ax in grid.flat)
            else "",
            samples_note(frame, panels, "loss"),
            options_note(tables, panels, "early_exit"),
        )  # fmt: skip
    return fig


def _add_legend(fig: Figure, columns: int) -> None:
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=3, label=name)
        for name, color, marker in RULES.values()
    ]
    handles += [
        Line2D([], [], color=GREY, marker=".", markersize=4, label="fixed loops"),
        Line2D([], [], color=INK, marker="D", linestyle="none", markersize=4.5, label="$K$ loops"),
    ]
    fig.legend(
        handles=handles, loc="outside upper center", ncols=5 if columns > 1 else 3,
        columnspacing=1.2,
    )  # fmt: skip


def _gains(frame: pd.DataFrame) -> pd.DataFrame:
    """The loss of each rule less that of fixed loops at the same mean iterations, by sample."""
    frame = frame.astype({"rule": str})
    parts = []
    for _, rows in frame.groupby([*KEYS, "sample"], observed=True, dropna=False, sort=False):
        fixed = rows[rows["rule"].eq(_FIXED)].sort_values("threshold")
        others = rows[rows["rule"].ne(_FIXED)]
        at_mean = np.interp(others["iterations"], fixed["iterations"], fixed["loss"])
        parts.append(others.assign(loss=others["loss"] - at_mean))
    return pd.concat(parts, ignore_index=True)


def _points(frame: pd.DataFrame, *, signed: bool = False) -> pd.DataFrame:
    """Mean iterations and mean loss with its interval, of each threshold."""
    keys = ["rule", "threshold"]
    losses = aggregate.with_errors(frame, keys, "loss")
    clusters = losses["clusters"].to_numpy(np.float64)
    half = np.zeros(len(losses))
    several = clusters > 1
    half[several] = (
        student.ppf(0.975, clusters[several] - 1) * losses["error"].to_numpy(np.float64)[several]
    )
    iterations = aggregate.with_errors(frame, keys, "iterations")
    return losses.assign(
        low=losses["mean"] - half, high=losses["mean"] + half, iterations=iterations["mean"]
    ).astype({"rule": str})


def _lines(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    sound = rows[rows["n"] > 0].sort_values("iterations")
    return {rule: sound[sound["rule"].eq(rule)] for rule in (*RULES, _FIXED)}


def _draw(ax: Axes, rows: pd.DataFrame, K: int | None) -> None:
    lines = _lines(rows)
    fixed = lines.pop(_FIXED)
    ax.grid(axis="y")
    if fixed.empty:
        say_unsound(ax, int(rows["n_flagged"].sum()))
        return
    for (_, color, marker), line in zip(RULES.values(), lines.values(), strict=True):
        ax.plot(line["iterations"], line["mean"], color=color, marker=marker, markersize=2.6,
                linewidth=1.0)  # fmt: skip
    ax.plot(fixed["iterations"], fixed["mean"], color=GREY, marker=".", markersize=4,
            linewidth=0.9, zorder=1.5)  # fmt: skip
    own = fixed[fixed["threshold"].eq(-1 if K is None else K)]
    ax.plot(own["iterations"], own["mean"], color=INK, marker="D", markersize=4.5,
            linestyle="none", zorder=4)  # fmt: skip
    shown = pd.concat([*lines.values(), fixed[fixed["iterations"] >= 1]])
    low, high = float(shown["mean"].min()), float(shown["mean"].max())
    room = _ROOM * max(high - low, 1e-3)
    last = float(fixed["iterations"].max())
    ax.set_ylim(low - room, high + 2 * room)
    ax.set_xlim(-0.04 * last, 1.04 * last)
    ax.set_xticks(every(0, int(last), 8))
    ax.ticklabel_format(axis="y", useOffset=False)
    for _, point in fixed[fixed["mean"] > high + 2 * room].iterrows():
        ax.annotate(
            f"{point['mean']:.2f} ↑", (float(point["iterations"]), 1.0), (0, -2), fontsize=TINY,
            xycoords=("data", "axes fraction"), textcoords="offset points", ha="left", va="top",
            color=GREY,
        )  # fmt: skip


def _draw_gains(ax: Axes, rows: pd.DataFrame, above: Axes) -> None:
    ax.set_xlabel("mean iterations per token")
    ax.sharex(above)
    lines = _lines(rows)
    for rule, (_, color, marker) in RULES.items():
        line = lines[rule]
        ax.fill_between(
            line["iterations"], line["low"], line["high"], color=color, alpha=0.16, linewidth=0
        )
        ax.plot(line["iterations"], line["mean"], color=color, marker=marker, markersize=2.2,
                linewidth=0.9)  # fmt: skip
    ax.axhline(0, color=GREY, linewidth=0.9, zorder=1.5)
    ax.tick_params(axis="y", labelsize=SMALL - 0.5)
