"""Figure 8 of the MeSH paper: perplexity against parameters, by variant and layout."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from loopscope.analysis.tables import Tables
from loopscope.analysis.tables import training_curves as curves
from loopscope.errors import InputError
from loopscope.figures.names import short_count
from loopscope.figures.notes import note
from loopscope.figures.run_groups import Group, group_labels, looks, run_groups, settings_note
from loopscope.figures.style import Figure, new_figure, style
from loopscope.figures.tag_placement import Tag, place_tags

_ROOM = 0.18  # around the points, as a share of what they span
_APART, _SPREAD = 1.5, 9.0  # points: how far apart the whiskers of variants are, at most in all
_WIDE = 5.0  # the largest count over the smallest from which the axis is logarithmic


def layers(tables: Tables, models: Sequence[str] | str | None = None) -> Figure:
    """Draw the perplexity at the end of training against non-embedding parameters (MeSH Fig. 8).

    Perplexity is exp(validation loss in nats per token). One marker per recipe: the mean over the
    seeds whose training is finished, whiskers from the least to the greatest; its layout is
    written beside it, once where the variants of a layout stand above each other. The points of a
    variant are joined in the order of their parameters.

    Args:
        tables: What was read; needs `training`.
        models: Names of runs; None takes all.

    Returns:
        The figure.

    Raises:
        InputError: if the table is missing, a run is not in it, or the finished runs do not have
            two different parameter counts.
    """
    frame, groups = run_groups(tables, models)
    if reason := why_no_layers(frame):
        raise InputError(f"nothing to draw: {reason}.")
    ends = curves.final_perplexity(frame).set_index("recipe")
    points = ends[["params", "mean", "low", "high"]]
    groups = [g for g in groups if g.recipe in ends.index]
    labels = group_labels(groups, rule=True)
    look = looks(groups, labels)
    widths = len({g.d_model for g in groups}) > 1
    whiskers = bool((ends["n"] > 1).any())
    step = min(_APART, _SPREAD / max(1, len(look) - 1)) if whiskers else 0.0
    with style():
        fig = new_figure(3.5 + 0.06 * max(map(len, look)) + 0.03 * min(30, len(groups)), 2.9)
        ax = fig.subplots()
        tags = []
        for number, label in enumerate(look):
            members = [g for g in groups if labels[g.recipe] == label]
            # equal counts (layouts of as many layers): by layout, so that the line is one line
            members.sort(key=lambda g: (ends["params"][g.recipe], g.layout, g.d_model))
            rows = ends.loc[[g.recipe for g in members]]
            shift = step * (number - (len(look) - 1) / 2)
            _draw_line(fig, ax, rows, label, look[label], shift)
            for g in members:
                x, mean, low, high = map(float, points.loc[g.recipe])
                text = f"{g.layout}, $D={g.d_model}$" if widths else g.layout
                tags.append(Tag(text=text, x=x, y=mean, low=low, high=high, shift=shift))
        _frame(ax, ends)
        ax.set_xlabel("non-embedding parameters")
        ax.set_ylabel("validation perplexity\nat the end of training")
        ax.grid(axis="y")
        fig.legend(loc="outside right center", handlelength=2.4)
        moved = "Variants are moved sideways a little, to show all whiskers." if step else ""
        note(fig, *_sentences(frame, groups, ends, labels), moved, settings_note(groups))
        place_tags(fig, ax, tags)
    return fig


def why_no_layers(frame: pd.DataFrame) -> str:
    """Say why the figure cannot be drawn.

    Args:
        frame: `tables.training`, or the runs of it that are asked for.

    Returns:
        The reason; empty where it can.
    """
    counts = curves.final_perplexity(frame)["params"].unique()
    if len(counts) == 0:
        return "no run is finished"
    if len(counts) == 1:
        return (
            f"all finished runs have {counts[0]:,} non-embedding parameters, and it compares at "
            "least two different counts"
        )
    return ""


def _draw_line(
    fig: Figure,
    ax: Axes,
    rows: pd.DataFrame,
    label: str,
    look: Mapping[str, Any],
    shift: float,
) -> None:
    """One variant: a marker per recipe, whiskers where there are several seeds."""
    several = (rows["n"] > 1).any()
    ax.errorbar(
        rows["params"],
        rows["mean"],
        yerr=[rows["mean"] - rows["low"], rows["high"] - rows["mean"]] if several else None,
        label=label,
        markersize=4,
        linewidth=0.8,
        elinewidth=0.8,
        capsize=2.0,
        capthick=0.8,
        markeredgewidth=0.7,
        transform=ax.transData + ScaledTranslation(shift / 72, 0, fig.dpi_scale_trans),
        **(look if len(rows) > 1 else {**look, "linestyle": "none"}),
    )


def _frame(ax: Axes, ends: pd.DataFrame) -> None:
    """Fit the axes to the points, with room for their names."""
    left, right = ends["params"].min(), ends["params"].max()
    if right >= _WIDE * left:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlim(left * (left / right) ** _ROOM, right * (right / left) ** _ROOM)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        ax.set_xlim(left - _ROOM * (right - left), right + _ROOM * (right - left))
    ax.xaxis.set_major_formatter(lambda value, _: short_count(value))
    low, high = ends["low"].min(), ends["high"].max()
    room = _ROOM * (high - low) or _ROOM
    ax.set_ylim(low - room, high + room)


def _sentences(
    frame: pd.DataFrame, groups: Sequence[Group], ends: pd.DataFrame, labels: dict[str, str]
) -> list[str]:
    sentences = ["exp(validation loss)"]
    ns = sorted(set(ends["n"]))
    if ns == [1]:
        sentences[0] += "; one seed per point: differences may be chance."
    else:
        seeds = f"n = {ns[0]}" if len(ns) == 1 else f"n = {ns[0]} to {ns[-1]}"
        sentences[0] += f": markers mean, whiskers least to greatest; {seeds} seeds per point."
    if len(set(labels.values())) < len(groups):
        sentences.append("Lines join the layouts of a variant.")
    runs = curves.progress(frame)
    if left := int((~runs["finished"]).sum()):
        sentences.append(f"Left out: {left} unfinished run{'' if left == 1 else 's'}.")
    return sentences
