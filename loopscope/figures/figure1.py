"""Figure 1 of the MeSH paper: the three diagnostics of one model side by side."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from loopscope.analysis.tables import Tables, aggregate
from loopscope.figures.cka_maps import (
    cell_size,
    cka_matrix,
    color_bar,
    draw_cka,
    flagged_pairs,
    select_cka,
)
from loopscope.figures.names import state_label
from loopscope.figures.notes import combined_note, note, options_note, paths_note
from loopscope.figures.panels import choose_one, need
from loopscope.figures.spectra import (
    BAND_NOTE,
    LISTED,
    SPECTRUM_LABEL,
    draw_spectrum,
    legend_note,
    state_looks,
)
from loopscope.figures.style import PAGE_WIDTH, SMALL, Figure, new_figure, style
from loopscope.figures.ticks import labelled
from loopscope.figures.update_bars import UPDATE_LABEL, draw_update
from loopscope.names import state_order

WIDE = 9
"""States that fit side by side; more give the heat map the right half of the page."""


def fig1(tables: Tables, model: str, loop: str | None = None) -> Figure:
    """Draw relative update, CKA (RBF, biased) and spectrum of one model (MeSH Figs. 1a, 1b, 1c).

    Args:
        tables: What was measured; needs `update`, `cka` and `spectrum`.
        model: The model's name.
        loop: Which of its loops; not needed where it has one.

    Returns:
        The figure.

    Raises:
        InputError: if a table is missing, the model or loop is not in it, or the tables hold
            several steps of it, or several loops and none is given.
    """
    changes = need(tables, "update")
    alike = select_cka(need(tables, "cka"), "rbf", "biased")
    decay = need(tables, "spectrum")
    panel = choose_one(tables, changes, model, loop, "update")
    choose_one(tables, alike, model, loop, "cka")
    choose_one(tables, decay, model, loop, "spectrum")
    bars = panel.rows(aggregate.means(changes[changes["model"].eq(model)], "update"))
    pairs = panel.rows(aggregate.means(alike[alike["model"].eq(model)], "cka"))
    matrix = cka_matrix(pairs)
    lines = panel.rows(aggregate.means(decay[decay["model"].eq(model)], "spectrum"))
    states = state_order(str(s) for s in lines["state"].unique())
    looks = state_looks(states)
    with style():
        fig, (left, middle, right) = _page(len(matrix))
        draw_update(left, bars, panel.paths)
        left.set_ylim(0, None if bars["n"].any() else 1)
        left.set_ylabel(UPDATE_LABEL)
        mesh = draw_cka(middle, matrix, size=cell_size(len(matrix)), flagged=flagged_pairs(pairs))
        color_bar(fig, mesh, [middle], "rbf", "biased", [matrix])
        draw_spectrum(right, lines, looks)
        right.set_xlabel("index $i$")
        right.set_ylabel(SPECTRUM_LABEL)
        _add_legend(right, states)
        for ax, title in zip(
            (left, middle, right), ("(a) relative update", "(b) CKA", "(c) spectrum"), strict=True
        ):
            ax.set_title(title)
        fig.suptitle(panel.title, fontsize=8.5)
        note(
            fig,
            "(a) mean ± SD; (b) mean, RBF kernel, biased estimator; (c)",
            BAND_NOTE[0].lower() + BAND_NOTE[1:],
            legend_note(states),
            paths_note([panel]),
            combined_note(
                panel,
                {
                    "(a)": (changes, "value"),
                    "(b)": (alike, "value"),
                    "(c)": (decay, "log10_sigma_rel"),
                },
            ),
            options_note(tables, [panel], "update", "cka", "spectrum"),
        )
    return fig


def _add_legend(ax: Axes, states: Sequence[str]) -> None:
    """List the drawn states to the right of the spectrum."""
    handles = {line.get_label(): line for line in ax.get_lines()}
    labels = [state_label(state) for state in labelled(states, LISTED)]
    labels = [label for label in labels if label in handles]
    if not handles:
        return
    ax.legend(
        [handles[label] for label in labels],
        labels,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        ncols=1 if len(labels) <= WIDE else 2,
        fontsize=SMALL,
        borderpad=0,
        handlelength=2.2,
        columnspacing=1.0,
    )


def _page(states: int) -> tuple[Figure, tuple[Axes, Axes, Axes]]:
    if states <= WIDE:
        fig = new_figure(PAGE_WIDTH, 2.75)
        left, middle, right = fig.subplots(1, 3, width_ratios=[1.05, 1.2, 1.25])
        return fig, (left, middle, right)
    fig = new_figure(PAGE_WIDTH, 4.2)
    grid = fig.add_gridspec(2, 2, width_ratios=[1.0, 1.35])
    places = (grid[0, 0], grid[:, 1], grid[1, 0])
    left, middle, right = (fig.add_subplot(place) for place in places)
    return fig, (left, middle, right)
