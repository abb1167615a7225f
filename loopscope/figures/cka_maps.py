"""Figure 4 of the MeSH paper: how alike the states of the loop are."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize

from loopscope.analysis.tables import Tables, aggregate
from loopscope.errors import unknown_name
from loopscope.figures.names import state_label
from loopscope.figures.notes import note, options_note, samples_note, states_note
from loopscope.figures.panels import Page, choose, need, page, say_unsound
from loopscope.figures.style import TINY, Figure, cell_text, heat_map, style
from loopscope.figures.ticks import labelled, spread_ends
from loopscope.names import state_order

CKA_RANGE = (0.0, 1.0)
"""The colour range of both estimators, so that figures compare; values below 0 take its end."""

ROOMY = 9
"""States whose CKA fits a panel of unit size with values printed; more take four times the area."""

PRINTED = 20
"""States whose CKA is printed; of more, the colours are shown alone and some have a label."""

_LABELS = 9  # states of a loop that have a label where not all have

_KERNELS = {"rbf": "RBF", "linear": "linear"}


def cka(
    tables: Tables,
    models: Sequence[str] | str | None = None,
    kernel: str = "rbf",
    estimator: str = "biased",
) -> Figure:
    """Draw the mean CKA of all pairs of states, one heat map per model (MeSH Figs. 1b, 4).

    Colours run from 0 to 1 for either estimator; the debiased one may fall below 0, which takes
    the colour of 0 (an arrow at the colour bar then says so) and keeps its printed value.

    Args:
        tables: What was measured; needs `cka`.
        models: Names in the order of the panels; None takes all.
        kernel: `rbf` or `linear`, as measured.
        estimator: `biased` or `debiased`, as measured.

    Returns:
        The figure.

    Raises:
        InputError: if the table is missing, or a model, kernel or estimator is not in it.
    """
    frame = select_cka(need(tables, "cka"), kernel, estimator)
    panels = choose(tables, frame, models, "cka")
    stats = aggregate.means(frame, "cka")
    parts = [p.rows(stats) for p in panels]
    matrices = [cka_matrix(p) for p in parts]
    units = [1 if len(m) <= ROOMY else 2 for m in matrices]
    with style():
        sheet = page(panels, width=1.4, height=1.4, widest=4, units=units)
        fig, axes = sheet.fig, sheet.axes
        alike = all(list(m.index) == list(matrices[0].index) for m in matrices)
        if alike:
            for ax in axes:
                ax.tick_params(labelleft=ax in sheet.leftmost)
        fig.set_figheight(_height(sheet, 1 if alike else sheet.columns // min(units)))
        meshes = [
            draw_cka(ax, matrix, size=cell_size(len(matrix)), flagged=flagged_pairs(part))
            for ax, matrix, part in zip(axes, matrices, parts, strict=True)
        ]
        color_bar(fig, meshes[0], axes, kernel, estimator, matrices)
        note(
            fig,
            f"Mean CKA between states ({kernel_label(kernel)} kernel, {estimator} estimator; "
            "tokens are the examples). Colours fixed to 0–1"
            f"{'; below 0 as 0' if _below(matrices) else ''}.",
            states_note(panels),
            samples_note(frame, panels),
            options_note(tables, panels, "cka"),
        )
        lines = fig.get_supxlabel().count("\n") + 1
        fig.set_figheight(fig.get_figheight() + 0.11 * max(0, lines - 2))
    return fig


def _height(sheet: Page, labelled_columns: int) -> float:
    """Inches for square maps in the width that labels and colour bar leave."""
    beside = 0.55 + 0.32 * labelled_columns
    side = (sheet.fig.get_figwidth() - beside) / sheet.columns - 0.06
    return sheet.rows * (side + 0.47) + 0.35


def select_cka(frame: pd.DataFrame, kernel: str, estimator: str) -> pd.DataFrame:
    """Select one kernel and estimator of the table.

    Args:
        frame: `tables.cka`.
        kernel: Its name.
        estimator: Its name.

    Returns:
        The rows.

    Raises:
        UnknownNameError: if it was not measured.
    """
    for column, name in (("kernel", kernel), ("estimator", estimator)):
        measured = [str(v) for v in frame[column].unique()]
        if name not in measured:
            raise unknown_name(
                column, name, measured, hint=f"The table 'cka' holds: {', '.join(measured)}."
            )
    return frame[frame["kernel"].eq(kernel) & frame["estimator"].eq(estimator)]


def why_no_rbf(frame: pd.DataFrame, estimator: str) -> str:
    """Say why a figure of CKA with the RBF kernel cannot be drawn.

    Args:
        frame: `tables.cka`, or the rows of it that are asked for.
        estimator: `biased` or `debiased`.

    Returns:
        The reason; empty where it can.
    """
    pairs = frame["kernel"].eq("rbf") & frame["estimator"].eq(estimator)
    return "" if pairs.any() else f"no {estimator} CKA with the RBF kernel was measured"


def cka_matrix(part: pd.DataFrame) -> pd.DataFrame:
    """Turn one model's pairs into a symmetric matrix.

    Args:
        part: This model's rows of `aggregate.cka`, one kernel and estimator.

    Returns:
        State × state; NaN where every sample was flagged.
    """
    pairs = part.assign(a=part["state_a"].astype(str), b=part["state_b"].astype(str))
    order = state_order([*pairs["a"], *pairs["b"]])
    upper = pairs.pivot(index="a", columns="b", values="mean").reindex(index=order, columns=order)
    return upper.combine_first(upper.T).loc[order, order]


def flagged_pairs(part: pd.DataFrame) -> int:
    """Count the values of one model that no cell contains.

    Args:
        part: This model's rows of `aggregate.cka`, one kernel and estimator.

    Returns:
        The number.
    """
    return int(part["n_flagged"].sum())


def draw_cka(ax: Axes, matrix: pd.DataFrame, *, size: float = TINY, flagged: int = 0) -> QuadMesh:
    """Draw one model's heat map, values printed where they fit, or say that it has no sound one.

    Args:
        ax: Where to draw.
        matrix: State × state.
        size: Font size of the values in points.
        flagged: Values that were left out; told where all were.

    Returns:
        The mesh.
    """
    norm = Normalize(*CKA_RANGE)
    values = matrix.to_numpy(dtype=np.float64)
    printed = len(matrix) <= PRINTED
    mesh = heat_map(ax, np.ma.masked_invalid(values), norm, lines=0.6 if printed else 0.0)
    if printed:
        cell_text(ax, values, norm, size=size)
    if not np.isfinite(values).any():
        say_unsound(ax, flagged)
    states = list(matrix.index)
    shown = states if printed else labelled(states, _LABELS)
    labels = [state_label(s) for s in shown]
    ticks = [states.index(s) + 0.5 for s in shown]
    ax.set_xticks(ticks, labels, rotation=90)
    ax.set_yticks(ticks, labels)
    if not printed:  # the first two and the last two would touch
        spread_ends(ax.get_xticklabels(), ha=("right", "left"))
        spread_ends(ax.get_yticklabels(), va=("bottom", "top"))
    ax.set_aspect("equal")
    return mesh


def color_bar(
    fig: Figure,
    mesh: QuadMesh,
    axes: list[Axes],
    kernel: str,
    estimator: str,
    matrices: list[pd.DataFrame],
) -> None:
    """Add the shared colour bar that says which CKA is shown.

    Args:
        fig: The figure.
        mesh: Any of its heat maps.
        axes: The panels it stands beside.
        kernel: The kernel's name.
        estimator: The estimator's name.
        matrices: What is drawn; decides whether anything lies below the range.
    """
    extend = "min" if _below(matrices) else "neither"
    bar = fig.colorbar(
        mesh, ax=axes, extend=extend, aspect=14, shrink=0.75, pad=0.015, fraction=0.05
    )
    bar.set_label(f"CKA ({kernel_label(kernel)}, {estimator})")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)


def kernel_label(kernel: str) -> str:
    """Write a kernel's name: RBF, linear.

    Args:
        kernel: The name in the table.

    Returns:
        The label.
    """
    return _KERNELS.get(kernel, kernel)


def cell_size(states: int) -> float:
    """Choose the font size of printed values.

    Args:
        states: Rows of the heat map.

    Returns:
        Points.
    """
    return TINY if states <= ROOMY else TINY - 0.5


def _below(matrices: list[pd.DataFrame]) -> bool:
    return any(bool((m.to_numpy(dtype=np.float64) < CKA_RANGE[0]).any()) for m in matrices)
