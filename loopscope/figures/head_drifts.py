"""Attention drift: how far the patterns of each head move from one iteration to the next."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize

from loopscope.analysis.tables import Tables, aggregate
from loopscope.figures.notes import note, options_note, samples_note
from loopscope.figures.panels import Panel, choose, need, only_model
from loopscope.figures.style import (
    PAGE_WIDTH,
    SMALL,
    TINY,
    Figure,
    cell_text,
    heat_map,
    new_figure,
    style,
)
from loopscope.figures.ticks import every

_CELL = 0.27  # inches of a cell with a number
_ROWS, _COLUMNS = 16, 14  # heads and iterations up to which cells have numbers
_LEAST = 0.01  # nats at which the scale ends at least: below there is rounding


def attention_drift(tables: Tables, model: str | None = None) -> Figure:
    """Draw the Jensen-Shannon divergence of each head's patterns between iterations, by layer.

    0: the head looks at the same tokens in iteration t + 1 as in t; ln 2 ≈ 0.69: at none of them.

    Args:
        tables: What was measured; needs `attention_drift`.
        model: The model; not needed where the table holds one.

    Returns:
        The figure, a panel for each layer of the core.

    Raises:
        InputError: if the table is missing or the model is not in it.
    """
    frame = need(tables, "attention_drift")
    model = only_model(frame, model, "attention_drift")
    panels = choose(tables, frame, model, "attention_drift")
    stats = aggregate.means(frame, "attention_drift")
    maps = [(panel, layer, grid) for panel in panels for layer, grid in _grids(panel, stats)]
    values = np.concatenate([grid.to_numpy().ravel() for _, _, grid in maps])
    top = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    norm = Normalize(0, max(top, _LEAST))
    heads = max(len(grid) for _, _, grid in maps)
    times = max(grid.shape[1] for _, _, grid in maps)
    numbers = heads <= _ROWS and times <= _COLUMNS
    cell = _CELL if numbers else max(0.06, min(0.16, 2.6 / heads))
    wide = max(0.9, times * (_CELL * 1.15 if numbers else 0.12)) + 0.35
    columns = max(1, min(len(maps), int((PAGE_WIDTH - 0.7) // wide)))
    rows = -(-len(maps) // columns)
    columns = -(-len(maps) // rows)
    with style():
        width = min(PAGE_WIDTH, max(3.4, columns * wide + 1.0))
        fig = new_figure(width, rows * (max(heads * cell, 0.6) + 0.45) + 0.75)
        axes = list(fig.subplots(rows, columns, squeeze=False).flat)
        for ax, (panel, layer, grid) in zip(axes, maps, strict=False):
            mesh = _draw(ax, grid, norm, numbers=numbers)
            ax.set_title(f"{panel.title}, layer {layer}")
        for ax in axes[len(maps) :]:
            ax.set_axis_off()
        for number, ax in enumerate(axes[: len(maps)]):
            if number % columns == 0:
                ax.set_ylabel("head")
            if number + columns >= len(maps):
                ax.set_xlabel("$t \\rightarrow t+1$")
        bar = fig.colorbar(mesh, ax=axes, fraction=0.04, aspect=25, pad=0.01)
        bar.set_label("JS divergence (nats)", fontsize=SMALL)
        note(
            fig,
            "Mean over queries and samples; 0: the same pattern, ln 2 ≈ 0.69: nothing in common.",
            samples_note(frame, panels),
            options_note(tables, panels, "attention_drift"),
        )
    return fig


def _grids(panel: Panel, stats: pd.DataFrame) -> list[tuple[int, pd.DataFrame]]:
    """Head × t of each layer."""
    rows = panel.rows(stats)
    return [
        (int(str(layer)), part.pivot(index="head", columns="t", values="mean"))
        for layer, part in rows.groupby("layer")
    ]


def _draw(ax: Axes, grid: pd.DataFrame, norm: Normalize, *, numbers: bool) -> QuadMesh:
    values = grid.to_numpy(np.float64)
    mesh = heat_map(ax, values, norm, lines=0.6 if numbers else 0.0)
    if numbers:
        cell_text(ax, values, norm, size=TINY)
    for axis, names, most in ((ax.xaxis, grid.columns, 8), (ax.yaxis, grid.index, 16)):
        shown = every(int(names[0]), int(names[-1]), most)
        places = [place for place, name in enumerate(names) if int(name) in shown]
        axis.set_ticks([place + 0.5 for place in places])
        axis.set_ticklabels([str(int(names[place])) for place in places])
    return mesh
