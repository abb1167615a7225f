"""Figure 6 (left) of the MeSH paper: validation loss over training tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from loopscope.analysis.tables import Tables
from loopscope.analysis.tables import training_curves as curves
from loopscope.errors import InputError
from loopscope.figures.names import printable, short_count
from loopscope.figures.notes import note
from loopscope.figures.run_groups import Group, group_labels, looks, run_groups, settings_note
from loopscope.figures.style import PAGE_WIDTH, SMALL, Figure, new_figure, style
from loopscope.models.native import Layout

LOSS_LABEL = "validation loss\n(nats per token)"
FEW = 4
"""Panels that have a legend of their own, with the final losses; more share one legend."""

_MARKERS = 8  # on a line, about
_LONG = 24  # letters that leave room for a panel beside its legend
_SETTLED = 0.1  # the share of a line that may leave the axis at the top


def training(tables: Tables, models: Sequence[str] | str | None = None) -> Figure:
    """Draw the validation loss over training tokens, one panel per layout (MeSH Fig. 6 left).

    One line per variant: the mean over the seeds whose training is finished, with a band from the
    least to the greatest. A run that is unfinished is a thin line of its own that ends in ×.
    A vanilla model stands beside the loop that it unrolls. Tokens are on a linear axis: what
    matters is where the lines end, and a logarithmic one would give that little room.

    Args:
        tables: What was read; needs `training`.
        models: Names of runs; None takes all.

    Returns:
        The figure.

    Raises:
        InputError: if the table is missing, a run is not in it, or none has a validation loss.
    """
    frame, groups = run_groups(tables, models)
    means, single = curves.validation(frame), curves.unfinished(frame)
    drawn = {*means["recipe"], *single["recipe"]}
    groups = [g for g in groups if g.recipe in drawn]
    if not groups:
        raise InputError("no run has a validation loss yet; wait for the first.")
    panels = _panels(groups)
    labels = group_labels(groups)
    look = looks(groups, labels)
    longest = max(map(len, labels.values()))
    legends = len(panels) == 1 or (len(panels) <= FEW and longest <= _LONG)
    with style():
        fig, axes, columns = _page(len(panels), longest, legends=legends)
        for ax, (title, members) in zip(axes, panels.items(), strict=False):
            recipes = [g.recipe for g in members]
            draw_curves(ax, recipes, labels, look, means=means, single=single)
            ax.set_title(title)
            ax.set_xlabel("training tokens")
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        cut = _frame(axes[: len(panels)], means, single)
        for ax in axes[::columns]:
            ax.set_ylabel(LOSS_LABEL)
        if legends:
            _legends(axes[: len(panels)])
        else:
            _one_legend(fig, axes[: len(panels)], list(look))
        note(fig, *_sentences(frame, groups, means, single, cut=cut), settings_note(groups))
    return fig


def draw_curves(
    ax: Axes,
    recipes: Sequence[str],
    labels: Mapping[str, str],
    look: Mapping[str, dict[str, Any]],
    *,
    means: pd.DataFrame,
    single: pd.DataFrame,
) -> None:
    """Draw the lines of one panel, from the highest final loss to the lowest.

    Args:
        ax: Where to draw.
        recipes: The groups of this panel.
        labels: recipe → name.
        look: name → line style.
        means: From `curves.validation`.
        single: From `curves.unfinished`.
    """
    several = means["n"].nunique() > 1
    lines = []
    for recipe in recipes:
        mean = means[means["recipe"].eq(recipe)]
        alone = single[single["recipe"].eq(recipe)]
        runs = [rows for _, rows in alone.groupby("model", sort=False)]
        if len(mean):
            last, mark = mean["mean"].iloc[-1], f" (n={mean['n'].iloc[0]})" if several else ""
        else:
            last, mark = max(runs, key=len)["val_loss"].iloc[-1], " ×"
        lines.append((last, f"{labels[recipe]}  {last:.3f}{mark}", recipe, mean, runs))
    lines.sort(key=lambda line: -line[0])
    for number, (_, text, recipe, mean, runs) in enumerate(lines):
        line_look = look[labels[recipe]]
        if len(mean):
            _draw_mean(ax, mean, text, line_look, number=number, lines=len(lines))
        for rows in runs:
            thin = {key: line_look[key] for key in ("color", "linestyle")} | {"linewidth": 0.7}
            label = "_unfinished" if len(mean) or rows is not runs[0] else text
            ax.plot(
                rows["tokens"], rows["val_loss"], label=label, marker="x",
                markevery=[len(rows) - 1], markersize=4, markeredgewidth=0.9, zorder=3, **thin,
            )  # fmt: skip


def _draw_mean(
    ax: Axes, mean: pd.DataFrame, text: str, look: Mapping[str, Any], *, number: int, lines: int
) -> None:
    """The mean over seeds with its band; markers of several lines stand beside each other."""
    tokens = mean["tokens"].to_numpy()
    if mean["n"].iloc[0] > 1:
        low, high = mean["low"].to_numpy(), mean["high"].to_numpy()
        ax.fill_between(tokens, low, high, color=look["color"], alpha=0.2, linewidth=0)
    every = math.ceil(len(tokens) / _MARKERS)
    marked = list(range(number * every // lines, len(tokens), every))
    ax.plot(
        tokens, mean["mean"], label=text, markevery=marked, markersize=3.2,
        linewidth=1.1, markeredgewidth=0.7, **look,
    )  # fmt: skip


def _panels(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Title → groups: those of the same layers of compute, whether shared or not, and width."""
    alike: dict[tuple[str, int], list[Group]] = {}
    for g in groups:
        alike.setdefault((str(Layout.parse(g.layout).unshared), g.d_model), []).append(g)

    def title(members: list[Group]) -> str:
        first = next((g for g in members if g.shared), members[0])
        return f"{first.layout}, $D={first.d_model}$"

    ordered = sorted(alike.values(), key=lambda members: _size(members[0]))
    return {title(members): members for members in ordered}


def _size(group: Group) -> tuple[int, int, str]:
    return Layout.parse(group.layout).n_layers, group.d_model, group.layout


def _page(panels: int, letters: int, *, legends: bool) -> tuple[Figure, list[Axes], int]:
    columns = 1 if panels == 1 else 2 if legends else min(3, panels)
    rows = math.ceil(panels / columns)
    width = PAGE_WIDTH if panels > 1 else 3.4 + 0.06 * letters
    height = rows * 1.95 + 0.45 if legends else rows * 1.6 + 0.8
    fig = new_figure(width, height)
    grid = fig.subplots(rows, columns, sharey=True, squeeze=False)
    return fig, list(grid.flat), columns


def _frame(axes: Sequence[Axes], means: pd.DataFrame, single: pd.DataFrame) -> bool:
    """Fit the axes to what the lines do after their beginning; whether something is cut off."""
    tops, bottoms, highest = [], [], []
    lines = [
        rows[["low", "high"]].assign(share=rows["tokens"] / rows["tokens"].max())
        for _, rows in means.groupby("recipe")
    ]
    for _, rows in single.groupby("model"):
        share, loss = rows["step"] / rows["steps_planned"], rows["val_loss"]
        lines.append(pd.DataFrame({"low": loss, "high": loss, "share": share}))
    for rows in lines:
        settled = rows[rows["share"] >= min(_SETTLED, rows["share"].max())]
        tops.append(settled["high"].max())
        bottoms.append(rows["low"].min())
        highest.append(rows["high"].max())
    low, high = min(bottoms), max(tops)
    room = 0.05 * (high - low) or 0.1
    axes[0].set_ylim(low - room, high + room)
    for ax in axes:
        ax.set_xlim(0, 1.03 * max(np.max(line.get_xdata()) for line in ax.get_lines()))
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        ax.xaxis.set_major_formatter(lambda value, _: short_count(value))
        ax.grid(axis="y")
    return bool(max(highest) > high + room)


def _legends(axes: Sequence[Axes]) -> None:
    for ax in axes:
        ax.legend(
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            title="loss at the end",
            title_fontsize=SMALL,
            alignment="left",
            handlelength=2.4,
            borderpad=0.2,
        )


def _one_legend(fig: Figure, axes: Sequence[Axes], order: Sequence[str]) -> None:
    handles: dict[str, Line2D] = {}
    for line in (line for ax in axes for line in ax.get_lines()):
        handles.setdefault(str(line.get_label()).rpartition("  ")[0], line)
    columns = max(1, int(fig.get_figwidth() // (0.5 + 0.065 * max(map(len, order)))))
    fig.legend(
        [handles[label] for label in order], order,
        loc="outside upper center", ncols=columns, handlelength=2.4,
    )  # fmt: skip


def _sentences(
    frame: pd.DataFrame,
    groups: Sequence[Group],
    means: pd.DataFrame,
    single: pd.DataFrame,
    *,
    cut: bool,
) -> list[str]:
    sentences = []
    ns = sorted(set(means["n"]))
    if ns == [1]:
        sentences.append("One seed per line: differences between lines may be chance.")
    elif ns:
        seeds = f"n = {ns[0]}" if len(ns) == 1 else f"n = {ns[0]} to {ns[-1]}"
        sentences.append(
            f"Lines: mean over seeds, bands: least to greatest; {seeds} seeds per line."
        )
    if any(g.variant == "vanilla" and g.K for g in groups) and any(g.shared for g in groups):
        sentences.append("vanilla: as many layers of compute, none of them shared.")
    if len(single):
        ends = single.groupby("model", sort=False)[["step", "steps_planned"]].last()
        names = [
            f"{printable(str(model))} at {100 * step / planned:.0f}\u00a0%"
            for model, step, planned in ends.itertuples()
        ]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        sentences.append(f"×: unfinished ({', '.join(names[:3])}{more}), in no mean.")
    if cut:
        sentences.append(f"The first {100 * _SETTLED:.0f}\u00a0% of a line may lie above the axis.")
    return sentences
