"""Figure 1 of the MeSH paper: the three diagnostics of one model side by side."""

from matplotlib.axes import Axes

from loopscope.analysis import aggregate
from loopscope.analysis.tables import Tables
from loopscope.figures.cka_maps import (
    cell_size,
    cka_matrix,
    color_bar,
    draw_cka,
    flagged_pairs,
    select_cka,
)
from loopscope.figures.names import state_order
from loopscope.figures.notes import combined_note, note, options_note
from loopscope.figures.panels import choose_one, need
from loopscope.figures.spectra import BAND_NOTE, SPECTRUM_LABEL, draw_spectrum, state_looks
from loopscope.figures.style import PAGE_WIDTH, SMALL, Figure, new_figure, style
from loopscope.figures.update_bars import UPDATE_LABEL, draw_update

WIDE = 9
"""States that fit side by side; more give the heat map the right half of the page."""


def fig1(tables: Tables, model: str) -> Figure:
    """Draw relative update, CKA (RBF, biased) and spectrum of one model (MeSH Figs. 1a, 1b, 1c).

    Args:
        tables: What was measured; needs `update`, `cka` and `spectrum`.
        model: The model's name.

    Returns:
        The figure.

    Raises:
        InputError: if a table is missing, the model is not in it, or the tables hold several
            steps or loops of it.
    """
    changes = need(tables, "update")
    alike = select_cka(need(tables, "cka"), "rbf", "biased")
    decay = need(tables, "spectrum")
    panel = choose_one(changes, model, "update")
    choose_one(alike, model, "cka")
    choose_one(decay, model, "spectrum")
    bars = panel.rows(aggregate.update(changes[changes["model"].eq(model)]))
    pairs = panel.rows(aggregate.cka(alike[alike["model"].eq(model)]))
    matrix = cka_matrix(pairs)
    lines = panel.rows(aggregate.spectrum(decay[decay["model"].eq(model)]))
    looks = state_looks(state_order(str(s) for s in lines["state"].unique()))
    with style():
        fig, (left, middle, right) = _page(len(matrix))
        draw_update(left, bars)
        left.set_ylim(0, None if bars["n"].any() else 1)
        left.set_ylabel(UPDATE_LABEL)
        mesh = draw_cka(middle, matrix, size=cell_size(len(matrix)), flagged=flagged_pairs(pairs))
        color_bar(fig, mesh, [middle], "rbf", "biased", [matrix])
        draw_spectrum(right, lines, looks)
        right.set_xlabel("index $i$")
        right.set_ylabel(SPECTRUM_LABEL)
        if right.get_lines():
            right.legend(
                loc="center left",
                bbox_to_anchor=(1.0, 0.5),
                ncols=1 if len(looks) <= WIDE else 2,
                fontsize=SMALL,
                borderpad=0,
                handlelength=2.2,
                columnspacing=1.0,
            )
        for ax, title in zip(
            (left, middle, right), ("(a) relative update", "(b) CKA", "(c) spectrum"), strict=True
        ):
            ax.set_title(title)
        fig.suptitle(panel.title, fontsize=8.5)
        note(
            fig,
            "(a) mean ± SD; (b) mean, RBF kernel, biased estimator; (c)",
            BAND_NOTE[0].lower() + BAND_NOTE[1:],
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
