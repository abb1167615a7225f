"""Paths of tokens in the plane of the first principal components of all states."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm

from loopscope.analysis.tables import Tables
from loopscope.figures.courses import trained_loops
from loopscope.figures.notes import note
from loopscope.figures.panels import Panel, choose, need, only_model, page
from loopscope.figures.style import GREY, HEAT, INK, SMALL, Figure, style
from loopscope.figures.ticks import every

_PLANES = (("pc1", "pc2"), ("pc1", "pc3"))


def orbit_path(tables: Tables, model: str | None = None) -> Figure:
    """Draw the paths of the first sample's tokens through h(0) … h(T), coloured by t.

    Components are fitted on the states of all t together; how much of their variance each
    explains stands on its axis. Hollow circles are h(0), squares the last state, diamonds h(K)
    where more loops were run; the thick line is the mean of the tokens that are shown.

    Args:
        tables: What was measured; needs `orbit_path`.
        model: The model; not needed where the table holds one.

    Returns:
        The figure, with two planes for each loop (one where there is no third component).

    Raises:
        InputError: if the table is missing or the model is not in it.
    """
    frame = need(tables, "orbit_path")
    model = only_model(frame, model, "orbit_path")
    panels = choose(tables, frame, model, "orbit_path")
    parts = [(panel, panel.rows(frame)) for panel in panels]
    planes = [
        (panel, rows, plane)
        for panel, rows in parts
        for plane in _PLANES
        if np.isfinite(rows[[*plane]]).all(axis=1).any()
    ]
    with style():
        shown = [panel for panel, _, _ in planes] or panels
        fig, axes, *_ = page(shown, width=2.4, height=2.5, extra=0.75, widest=2)
        T = int(frame["t"].max())
        norm = BoundaryNorm(np.arange(-0.5, T + 1), 256)
        for ax, (panel, rows, plane) in zip(axes, planes, strict=False):
            _draw(ax, rows, plane, norm, trained_loops(tables, panel))
        colours = ScalarMappable(norm, colormaps[HEAT])
        bar = fig.colorbar(colours, ax=axes, fraction=0.03, aspect=30, pad=0.01)
        bar.set_ticks(every(0, T, 12))
        bar.set_label("$t$")
        tokens = ", ".join(f"{rows['pos'].nunique()}" for _, rows in parts[:1])
        lost = int(frame["flag"].notna().sum())
        note(
            fig,
            f"{tokens} tokens of the first sample, evenly spaced.",
            "Circles: $h(0)$; squares: the last state"
            + ("; diamonds: $h(K)$." if any(_goes_on(tables, p, r) for p, r in parts) else "."),
            "Thick: their mean. Components are those of all states together.",
            f"{lost} states left out: not finite." if lost else "",
        )
    return fig


def _goes_on(tables: Tables, panel: Panel, rows: pd.DataFrame) -> bool:
    K = trained_loops(tables, panel)
    return K is not None and int(rows["t"].max()) > K


def _draw(
    ax: Axes, rows: pd.DataFrame, plane: tuple[str, str], norm: BoundaryNorm, K: int | None
) -> None:
    x, y = (
        rows.pivot_table(index="pos", columns="t", values=name, dropna=False).to_numpy(np.float64)
        for name in plane
    )
    T = x.shape[1] - 1
    colours = colormaps[HEAT]
    many = np.stack([x, y], -1)  # (token, t, 2)
    steps = many[:, [[t, t + 1] for t in range(T)]].reshape(-1, 2, 2)
    which = np.tile(np.arange(T) + 0.5, len(many))
    finite = np.isfinite(steps).all((1, 2))
    lines = LineCollection(
        list(steps[finite]), colors=colours(norm(which[finite])), linewidths=0.5, alpha=0.55
    )
    ax.add_collection(lines)
    ax.scatter(x[:, 0], y[:, 0], s=9, facecolors="white", edgecolors=colours(norm(0)),
               linewidths=0.6, zorder=3)  # fmt: skip
    ax.scatter(x[:, T], y[:, T], s=8, marker="s", color=colours(norm(T)), linewidths=0, zorder=3)
    if K is not None and 0 < K < T:
        ax.scatter(x[:, K], y[:, K], s=8, marker="D", color=colours(norm(K)), linewidths=0,
                   zorder=3)  # fmt: skip
    mean = np.nanmean(many, axis=0)
    ax.plot(mean[:, 0], mean[:, 1], color=INK, linewidth=1.6, zorder=4)
    ax.scatter(mean[:, 0], mean[:, 1], s=14, c=np.arange(T + 1), cmap=HEAT, norm=norm,
               edgecolors=INK, linewidths=0.7, zorder=5)  # fmt: skip
    ax.axhline(0, color=GREY, linewidth=0.4, zorder=-1)
    ax.axvline(0, color=GREY, linewidth=0.4, zorder=-1)
    ax.autoscale_view()
    for name, axis in zip(plane, (ax.xaxis, ax.yaxis), strict=True):
        share = float(rows[f"explained{name[-1]}"].iloc[0])
        axis.set_label_text(f"PC {name[-1]} ({100 * share:.0f} % of variance)", fontsize=SMALL)
