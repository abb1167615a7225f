"""What the model loses where something in it is changed, place by place."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from loopscope.analysis.tables import Tables
from loopscope.errors import InputError, unknown_name
from loopscope.figures.effect_places import (
    HOWS,
    KINDS,
    ROUTERS,
    Mark,
    kinds_of,
    linear_part,
    mark,
    model_rows,
    place_means,
    way_sentence,
)
from loopscope.figures.names import printable
from loopscope.figures.notes import note, options_note, paths_note, samples_note
from loopscope.figures.panels import Panel, say_unsound
from loopscope.figures.style import (
    GREY,
    INK,
    PAGE_WIDTH,
    SMALL,
    TINY,
    Figure,
    new_figure,
    style,
)

VALUES = {
    "loss": "Δ loss (nats)",
    "kl": "KL (nats)",
    "changed": "changed (share)",
    "interchange": "interchange (share)",
}
"""Columns of the table `effect` that can be drawn, and their axes."""

_MEANINGS = {
    "loss": "Δ loss: of the next tokens, changed less clean run, nats per token.",
    "kl": "KL(clean ‖ changed) of the next tokens, nats per token.",
    "changed": "Changed: share of tokens whose top prediction is another.",
    "interchange": "Interchange: share of pairs in which the patched base gives the answer that it "
    "would have if the source's value were its own; dashed: not patched, dotted: the source.",
}

_ROW = 1.12  # inches of a row of panels
_LEAST_UNITS = 28  # places that a row has room for, if no panel is wider
_GAP = 0.8  # places that lie between groups
_LABELS = 46  # places of a panel that are each labelled
_TITLE = 8.5  # points
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def effect(tables: Tables, model: str | None = None, value: str | None = None) -> Figure:
    """Draw what an intervention at each place does: total and direct effect, with intervals.

    Points are means over samples, whiskers 95 % intervals by document. Total: routers are
    recomputed after the change; direct: they keep their clean weights. Axes in nats are linear up
    to their first tick on either side of 0 and logarithmic beyond.

    Args:
        tables: What was measured; needs `effect`.
        model: The model's name; not needed where the table holds one.
        value: `loss`, `kl`, `changed` or `interchange`; when not given `interchange` where it was
            measured, else `loss`.

    Returns:
        The figure; one panel for each kind of place.

    Raises:
        InputError: if the table is missing, the model is not in it, or the value was not measured.
    """
    panel, rows = model_rows(tables, model)
    value = _value(rows, value)
    means = place_means(rows, value)
    parts = {kind: means[means["kind"].eq(kind)] for kind in kinds_of(means)}
    drawn = {kind: _Places(part, panel, kind) for kind, part in parts.items()}
    with style():
        fig, axes, leftmost = _page(drawn)
        places = means[~means["kind"].eq("control")]
        for kind, ax in axes.items():
            _draw(ax, drawn[kind], kind)
            _draw_controls(ax, means[means["kind"].eq("control")], kind == next(iter(axes)))
        _scale(list(axes.values()), places, value)
        for ax in leftmost:
            ax.set_ylabel(VALUES[value], fontsize=SMALL)
        _legend(fig, places, panel)
        note(
            fig,
            _MEANINGS[value],
            "Points: mean over samples, whiskers: 95 % interval by document.",
            _routers_sentence(places),
            way_sentence([str(how) for how in places["how"].unique()]),
            _slots_sentence(drawn),
            options_note(tables, [panel], "effect"),
            paths_note([panel]),
            samples_note(rows[~rows["kind"].eq("control")], [panel], value),
        )
    return fig


def _value(rows: pd.DataFrame, value: str | None) -> str:
    if value is None:
        return "interchange" if rows["interchange"].notna().any() else "loss"
    if value not in VALUES:
        raise unknown_name("value", value, list(VALUES))
    if value == "interchange" and not rows["interchange"].notna().any():
        raise InputError(
            "no counterfactual answers were given, so the table has no interchange accuracy; "
            "give answers to intervene, or draw loss, kl or changed."
        )
    return value


class _Places:
    """The places of one kind: where each stands on the x-axis, and its labels."""

    def __init__(self, rows: pd.DataFrame, panel: Panel, kind: str) -> None:
        self.rows = rows
        self.hows = list(dict.fromkeys(rows["how"].astype(str)))
        unique = rows[["what", "t"]].drop_duplicates()
        self.marks: dict[str, Mark] = {
            str(what): mark(str(what), kind, int(t), panel.paths)
            for what, t in zip(unique["what"], unique["t"], strict=True)
        }
        groups = list(dict.fromkeys(m.group for m in self.marks.values()))
        ordered = sorted(self.marks, key=lambda what: groups.index(self.marks[what].group))
        self.x: dict[str, float] = {}
        self.groups: dict[str, list[float]] = {}
        x, before = 0.0, None
        for what in ordered:
            group = self.marks[what].group
            x += _GAP if before is not None and group != before else 0.0
            self.x[what], before = x, group
            self.groups.setdefault(group, []).append(x)
            x += 1.0
        self.units = max(x, 3.0)


def _page(drawn: dict[str, _Places]) -> tuple[Figure, dict[str, Axes], list[Axes]]:
    """Panels in rows of about equal numbers of places."""
    widest = max([_LEAST_UNITS, *(places.units for places in drawn.values())])
    room = 0.06 * widest  # of a panel's edge
    lines: list[list[str]] = []
    left = 0.0
    for kind, places in drawn.items():
        need_units = places.units + room
        if not lines or left < need_units - 1e-6:
            lines.append([])
            left = widest + room
        lines[-1].append(kind)
        left -= need_units
    fig = new_figure(PAGE_WIDTH, _ROW * len(lines) + 0.95 + 0.16 * len(lines))
    grid = fig.add_gridspec(len(lines), 1)
    axes: dict[str, Axes] = {}
    for number, kinds in enumerate(lines):
        units = [drawn[kind].units + room for kind in kinds]
        rest = widest + room - sum(units)
        ratios = [*units, rest] if rest > room else units
        row = grid[number].subgridspec(1, len(ratios), width_ratios=ratios)
        for place, kind in enumerate(kinds):
            first = next(iter(axes.values()), None)
            axes[kind] = fig.add_subplot(row[place], sharey=first)
            if place:
                axes[kind].tick_params(labelleft=False)
    return fig, axes, [axes[kinds[0]] for kinds in lines]


def _draw(ax: Axes, places: _Places, kind: str) -> None:
    rows = places.rows
    routers = [r for r in ROUTERS if rows["routers"].eq(r).any()]
    lanes = [(how, r) for how in places.hows for r in routers]
    step = min(0.3, 0.8 / max(len(lanes), 1))
    small = len(places.x) * len(lanes) > _LABELS
    for lane, (how, router) in enumerate(lanes):
        part = rows[rows["how"].eq(how) & rows["routers"].eq(router) & rows["n"].gt(0)]
        x = [places.x[str(what)] + (lane - (len(lanes) - 1) / 2) * step for what in part["what"]]
        _, color, marker = ROUTERS[router]
        look = _marker(how) if len(places.hows) > 1 else marker
        whiskers = np.stack([part["mean"] - part["low"], part["high"] - part["mean"]])
        ax.errorbar(
            x, part["mean"], yerr=whiskers, linestyle="none", marker=look,
            markersize=2.0 if small else 3.0, markeredgewidth=0.7, elinewidth=0.7,
            color=GREY if how == "erase_random" else color, label=f"_{how} {router}",
            markerfacecolor="white" if router == "frozen" or how == "erase_random" else color,
        )  # fmt: skip
    if not rows["n"].any():
        say_unsound(ax, int(rows["n_flagged"].sum()))
    ax.axhline(0, color=INK, linewidth=0.5, zorder=0)
    title = KINDS.get(kind, printable(kind))
    if len(places.hows) == 1:
        title += f": {printable(places.hows[0])}"
    ax.set_title(title, fontsize=SMALL + 0.5, loc="left")
    _label(ax, places, kind)
    ax.set_xlim(-0.8, places.units - 0.2)
    ax.grid(axis="y")


def _label(ax: Axes, places: _Places, kind: str) -> None:
    """Each place by itself (some of many), its group above."""
    labels = {what: places.marks[what].label for what in places.x}
    names = list(dict.fromkeys(labels.values()))
    many = len(labels) > _LABELS
    shown = {*names[:: max(2, len(names) // 2)]} if many else {*names}
    ticks = [(places.x[what], label) for what, label in labels.items() if label in shown]
    ax.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
    ax.tick_params(axis="x", length=0, pad=1.5)
    upright = kind in ("edge", "joint") or any(len(x) > 5 and "$" not in x for x in shown)
    for text in ax.get_xticklabels():
        text.set(fontsize=TINY, rotation=90 if upright else 0)
    groups = {group: xs for group, xs in places.groups.items() if group}
    if not groups and kind != "joint":
        ax.set_xlabel("$t$", fontsize=SMALL, labelpad=0.5)
    for i, (group, xs) in enumerate(groups.items()):
        if i:
            ax.axvline(min(xs) - (1 + _GAP) / 2, color="#BBBBBB", linewidth=0.4, zorder=0)
        ax.annotate(
            group, (float(np.mean(xs)), 1.0), (0, -1.5), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="top", fontsize=TINY, color=GREY,
        )  # fmt: skip


def _draw_controls(ax: Axes, controls: pd.DataFrame, first: bool) -> None:
    """The shares without an intervention: of the base, and of the source by itself."""
    shares = controls[controls["n"] > 0].groupby("what", observed=True)["mean"].first()
    for what, share in shares.items():
        source = what == "source"
        ax.axhline(float(share), color=GREY, linewidth=0.8, linestyle=":" if source else "--")
        if first:
            ax.annotate(
                "source itself" if source else "not patched", (1.0, share), (-1, 1),
                xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                va="bottom", fontsize=TINY, color=GREY,
            )  # fmt: skip


def _scale(axes: Sequence[Axes], means: pd.DataFrame, value: str) -> None:
    """The common y-axis, with room for the groups' labels on top."""
    ends = pd.concat([means["low"], means["high"]]).dropna()
    if value in ("changed", "interchange"):
        axes[0].set_ylim(min(-0.03, 0.0), 1.15)
        axes[0].set_yticks([0, 0.5, 1])
        return
    if ends.empty or not ends.abs().max():
        axes[0].set_ylim(-1, 1)
        return
    edge = linear_part(ends)
    for ax in axes:
        symlog_y(ax, ends, edge, room=0.12)


def symlog_y(ax: Axes, ends: pd.Series, edge: float, room: float) -> None:
    """Make a y-axis linear around 0 and logarithmic beyond, with a tick at each decade.

    Args:
        ax: The axes.
        ends: What must be seen.
        edge: Where it stops being linear.
        room: Share of the height to leave free on top.
    """
    ax.set_yscale("symlog", linthresh=edge, linscale=0.6)
    forward, backward = ax.yaxis.get_transform(), ax.yaxis.get_transform().inverted()
    low, high = forward.transform(np.array([min(ends.min(), 0.0), max(ends.max(), 0.0)]))
    span = max(high - low, 1e-12)
    bottom, top = backward.transform(np.array([low - 0.06 * span, high + (0.06 + room) * span]))
    ax.set_ylim(bottom, top)
    decades = edge * 10.0 ** np.arange(0, 12)
    ticks = [0.0, *decades, *(-decades)]
    ax.yaxis.set_major_locator(FixedLocator([y for y in ticks if bottom <= y <= top]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}".replace("-", "−")))
    ax.yaxis.set_minor_locator(NullLocator())


def head_figure(fig: Figure, title: str, handles: Sequence[Line2D]) -> None:
    """Write a figure's title, and its legend below it.

    Args:
        fig: The figure.
        title: A model's name.
        handles: What the legend lists.
    """
    if not handles:
        fig.suptitle(title, fontsize=_TITLE)
        return
    fig.legend(
        handles=handles, loc="outside upper center", ncols=min(5, len(handles)), title=title,
        title_fontsize=_TITLE,
    )  # fmt: skip


def _marker(how: str) -> str:
    """Of a way of intervening, where a panel shows several."""
    return _MARKERS[[*HOWS, how].index(how) % len(_MARKERS)]


def _legend(fig: Figure, means: pd.DataFrame, panel: Panel) -> None:
    """The model's name, and what the colours and markers are."""
    handles = []
    routers = [r for r in ROUTERS if means["routers"].eq(r).any()]
    for router in routers if len(routers) > 1 else []:
        title, color, marker = ROUTERS[router]
        face = "white" if router == "frozen" else color
        words = "routers recomputed" if router == "recomputed" else "routers frozen"
        handles.append(
            Line2D([], [], color=color, marker=marker, markersize=3.5, linestyle="none",
                   markerfacecolor=face, label=f"{title} effect ({words})")
        )  # fmt: skip
    by_kind = means.groupby("kind", observed=True)["how"].unique()
    several = max(([str(h) for h in hows] for hows in by_kind), key=len, default=[])
    for how in several if len(several) > 1 else []:
        handles.append(
            Line2D([], [], color=GREY, marker=_marker(how), markersize=3.5, linestyle="none",
                   label=how)
        )  # fmt: skip
    head_figure(fig, panel.title, handles)


def _routers_sentence(means: pd.DataFrame) -> str:
    if means["routers"].nunique() < 2:
        return ""
    return "Direct: routers keep the weights of the unchanged run."


def _slots_sentence(drawn: dict[str, _Places]) -> str:
    if "slot" not in drawn:
        return ""
    return (
        "Slots: changed after a step's write, for all that reads them later; reads and writes: at "
        "that step alone."
    )
