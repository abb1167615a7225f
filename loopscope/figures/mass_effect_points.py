"""Mass against effect: whether what is weighted most is what is needed most."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter
from scipy.stats import rankdata

from loopscope.analysis.collapse import RankCorrelation, rank_correlation
from loopscope.analysis.tables import Tables
from loopscope.errors import InputError
from loopscope.figures.effect_bars import head_figure, symlog_y
from loopscope.figures.effect_places import (
    KINDS,
    ROUTERS,
    kinds_of,
    linear_part,
    mark,
    model_rows,
    place_means,
    way_sentence,
)
from loopscope.figures.names import printable
from loopscope.figures.notes import note, options_note, samples_note
from loopscope.figures.panels import Panel
from loopscope.figures.style import GREY, INK, PAGE_WIDTH, SMALL, TINY, Figure, new_figure, style
from loopscope.figures.tag_placement import Tag, place_tags_of

MASSES = {
    "iteration": r"relative step $\Vert h(t\!+\!1)-h(t)\Vert/\Vert h(t)\Vert$",
    "attention": "output over stream",
    "mlp": "output over stream",
    "head": "output over stream",
    "slot": "mean read weight, later reads",
    "write": "mean write weight",
    "read": "mean read weight",
    "edge": r"mean $|\alpha|$",
}
"""What the mass of each kind of place is."""

FEWEST = 4
"""Of fewer places there is no panel."""

_SAME = 1e-4  # masses that differ by less, relative to the largest, are the same
_TAGGED = 4  # places of a panel that are named
_WIDE = 20.0  # masses that span more than this factor have a logarithmic axis


class _Cloud(NamedTuple):
    """One panel: places of one kind (attention and MLP together), changed in one way."""

    kinds: tuple[str, ...]
    how: str
    rows: pd.DataFrame  # of the table
    points: pd.DataFrame  # what, kind, t, routers; x, x_low, x_high; y, y_low, y_high


def mass_effect(tables: Tables, model: str | None = None) -> Figure:
    """Draw the effect of each place against its mass, with Spearman's ρ and its interval.

    Mass: the mean router weight of writes and reads, |α| of edges, the norm of a part's output over
    that of the stream. Effect: Δ loss, total and direct. Bars are 95 % intervals by document.

    Args:
        tables: What was measured; needs `effect`.
        model: The model's name; not needed where the table holds one.

    Returns:
        The figure; one panel for each kind of place of which there are at least four.

    Raises:
        InputError: if the table is missing, the model is not in it, or it has too few places.
    """
    panel, rows = model_rows(tables, model)
    if reason := why_no_mass_effect(rows):
        raise InputError(f"mass against effect of {model!r} cannot be drawn: {reason}.")
    clouds = _clouds(rows)
    with style():
        fig, axes = _page(len(clouds))
        low_high = [cloud.points[end] for cloud in clouds for end in ("y_low", "y_high")]
        ends = pd.concat(low_high)
        for number, (ax, cloud) in enumerate(zip(axes, clouds, strict=True)):
            _draw(ax, cloud, ends)
            _tell(ax, cloud)
            if number % 3 == 0:
                ax.set_ylabel("Δ loss (nats per token)")
            else:
                ax.tick_params(labelleft=False)
        _legend(fig, clouds, panel)
        drawn = pd.concat([cloud.rows for cloud in clouds])
        note(
            fig,
            "Points: places, means over samples; bars: 95 % intervals by document. ρ: Spearman's, "
            "over the places, with its 95 % interval (documents resampled); by norm: with the "
            "length of what the place adds to the state as mass. Named: where ranks by mass and by "
            "effect differ most, and the largest effect.",
            way_sentence([cloud.how for cloud in clouds]),
            options_note(tables, [panel], "effect"),
            samples_note(drawn, [panel], "loss"),
        )
        place_tags_of(fig, [(ax, _tags(c, panel)) for ax, c in zip(axes, clouds, strict=True)])
    return fig


def why_no_mass_effect(rows: pd.DataFrame) -> str:
    """Tell why a model's rows allow no figure.

    Args:
        rows: Its rows of the table `effect`.

    Returns:
        The reason; empty where there is a kind with four places whose masses differ.
    """
    if _groups(rows):
        return ""
    return f"no kind of place has {FEWEST} places with masses that differ"


def _groups(rows: pd.DataFrame) -> list[tuple[tuple[str, ...], str]]:
    """Kinds (attention and MLP together) and ways of which there are enough places.

    Not where all masses are the same, as those of edges are in a model without routers.
    """
    sound = rows[rows["mass"].notna() & rows["flag"].isna() & rows["loss"].notna()]
    kinds = [k for k in kinds_of(sound) if k not in ("attention", "mlp")]
    parts = tuple(k for k in ("attention", "mlp") if sound["kind"].eq(k).any())
    groups = []
    for group in [*((k,) for k in kinds), *([parts] if parts else [])]:
        of_kind = sound[sound["kind"].isin(group)]
        by_how = of_kind.groupby("how", observed=True, sort=False)
        spread = by_how["mass"].agg(np.ptp) > _SAME * by_how["mass"].max()
        places = by_how["what"].nunique()
        enough = places.index[places.ge(FEWEST) & spread].astype(str)
        groups += [(group, how) for how in enough if how != "erase_random"]
    return groups


def _clouds(rows: pd.DataFrame) -> list[_Cloud]:
    mass, loss = (place_means(rows, column) for column in ("mass", "loss"))
    keys = ["what", "kind", "t", "how", "routers"]
    points = mass[[*keys, "mean", "low", "high"]].rename(
        columns={"mean": "x", "low": "x_low", "high": "x_high"}
    )
    y = loss[[*keys, "mean", "low", "high"]].rename(
        columns={"mean": "y", "low": "y_low", "high": "y_high"}
    )
    points = points.merge(y, on=keys).dropna(subset=["x", "y"])
    return [
        _Cloud(
            kinds, how, rows[rows["kind"].isin(kinds) & rows["how"].eq(how)],
            points[points["kind"].isin(kinds) & points["how"].eq(how)],
        )
        for kinds, how in _groups(rows)
    ]  # fmt: skip


def _page(panels: int) -> tuple[Figure, list[Axes]]:
    columns = min(3, panels)
    lines = -(-panels // columns)
    fig = new_figure(max(3.4, PAGE_WIDTH * columns / 3), 2.25 * lines + 0.75)
    grid = fig.subplots(lines, columns, squeeze=False)
    axes = list(grid.ravel())
    for ax in axes[panels:]:
        ax.set_axis_off()
    return fig, axes[:panels]


def _draw(ax: Axes, cloud: _Cloud, ends: pd.Series) -> None:
    for router, (_, color, marker) in ROUTERS.items():
        part = cloud.points[cloud.points["routers"].eq(router)]
        ax.errorbar(
            part["x"], part["y"],
            xerr=np.stack([part["x"] - part["x_low"], part["x_high"] - part["x"]]),
            yerr=np.stack([part["y"] - part["y_low"], part["y_high"] - part["y"]]),
            linestyle="none", marker=marker, markersize=2.8, markeredgewidth=0.6, elinewidth=0.5,
            color=color, markerfacecolor="white" if router == "frozen" else color, alpha=0.85,
            label=router,
        )  # fmt: skip
    ax.axhline(0, color=INK, linewidth=0.5, zorder=0)
    if ends.abs().max() > 0:
        symlog_y(ax, ends, linear_part(ends), room=0.34)
    _scale_x(ax, cloud.points)
    ax.set_xlabel(MASSES.get(cloud.kinds[0], "mass"))
    title = ", ".join(KINDS.get(kind, printable(kind)) for kind in cloud.kinds)
    ax.set_title(f"{title}: {printable(cloud.how)}", fontsize=SMALL + 0.5, loc="left")
    ax.grid(color="#EEEEEE")


def _scale_x(ax: Axes, points: pd.DataFrame) -> None:
    least, most = points["x"].min(), points["x"].max()
    if least > 0 and most > _WIDE * least:
        ax.set_xscale("log")
        ax.set_xlim(least / 1.6, most * 1.6)
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.06 * (most - least) or 0.1 * abs(most) or 1.0
        ax.set_xlim(least - room, most + room)
        ax.xaxis.set_major_locator(MaxNLocator(5))


def _tell(ax: Axes, cloud: _Cloud) -> None:
    """Write ρ of total and direct effect, and by the norm, above the points."""
    lines = []
    for router, (name, color, _) in ROUTERS.items():
        rows = cloud.rows[cloud.rows["routers"].eq(router)]
        if len(rows):
            rho = rank_correlation(rows, "mass", "loss", ["what"])
            lines.append((f"{name}: {_written(rho)}", color))
    rows = cloud.rows[cloud.rows["routers"].eq("recomputed")]
    by_norm = rank_correlation(rows, "mass_norm", "loss", ["what"])
    if np.isfinite(by_norm.rho):
        lines.append((f"total, by norm: {_written(by_norm)}", GREY))
    for number, (text, color) in enumerate(lines):
        ax.annotate(
            text, (0.02, 1.0), (0, -1.5 - 7.2 * number), xycoords="axes fraction",
            textcoords="offset points", ha="left", va="top", fontsize=TINY + 0.3, color=color,
        )  # fmt: skip


def _written(rho: RankCorrelation) -> str:
    if not np.isfinite(rho.rho):
        return "ρ n/a"
    text = f"ρ = {rho.rho:.2f}"
    if np.isfinite(rho.low):
        text += f" [{rho.low:.2f}, {rho.high:.2f}]"
    return text.replace("-", "−")


def _tags(cloud: _Cloud, panel: Panel) -> list[Tag]:
    """Where ranks differ most, and the largest effect."""
    points = cloud.points[cloud.points["routers"].eq("recomputed")]
    if points.empty:
        return []
    apart = np.abs(rankdata(points["x"]) - rankdata(points["y"]))
    order = list(np.argsort(-apart, kind="stable")[: _TAGGED - 1])
    order = list(dict.fromkeys([int(points["y"].abs().to_numpy().argmax()), *order]))
    return [
        Tag(
            text=_place_text(points.iloc[i], panel), x=float(points["x"].iloc[i]),
            y=float(points["y"].iloc[i]), low=float(points["y_low"].iloc[i]),
            high=float(points["y_high"].iloc[i]),
        )
        for i in order
    ]  # fmt: skip


def _place_text(point: pd.Series, panel: Panel) -> str:
    group, label = mark(str(point["what"]), str(point["kind"]), int(point["t"]), panel.paths)
    if point["kind"] == "edge":
        return f"{label} → {group}"
    if point["kind"] in ("slot", "write", "read"):
        return str(point["what"]).rpartition(" ")[2]
    part = {"attention": "attn ", "mlp": "MLP "}.get(str(point["kind"]), "")
    return f"{part}{group or 't ='} {label}".strip()


def _legend(fig: Figure, clouds: list[_Cloud], panel: Panel) -> None:
    routers = [r for r in ROUTERS if any(c.points["routers"].eq(r).any() for c in clouds)]
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=3.5, linestyle="none",
               markerfacecolor="white" if router == "frozen" else color,
               label=f"{name} effect (routers {router})")
        for router, (name, color, marker) in ROUTERS.items()
        if len(routers) > 1
    ]  # fmt: skip
    head_figure(fig, panel.title, handles)
