"""The look of every figure: fonts, colours and a Figure that shows itself once in Jupyter."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import matplotlib.style
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure as MatplotlibFigure

PAGE_WIDTH = 7.0
"""Inches; the text width of a two-column page."""

TINY, SMALL, NORMAL = 5.5, 6.5, 7.5
"""Font sizes in points: cell values, ticks and notes, titles and axis labels."""

INK, GREY = "#222222", "#666666"

# Okabe & Ito's colour-blind safe palette, without the yellow that vanishes on white paper.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
LINES = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

BROWN = "#7A4B1E"

_VARIANTS = {
    "vanilla": (BLACK, "o"),
    "base": (BLUE, "s"),
    "residual": (GREEN, "^"),
    "anchor": (ORANGE, "D"),
    "anchor_emb": (SKY, "v"),
    "residual+anchor": (GREEN, "<"),
    "residual+anchor_emb": (SKY, ">"),
    "anchor+anchor_emb": (ORANGE, "p"),
    "residual+anchor+anchor_emb": (BLUE, "d"),
    "static": (PURPLE, "X"),
    "dynamic": (BROWN, "h"),
    "mesh": (VERMILLION, "P"),
}
"""Colour and marker of each variant, in the order of a legend."""

_PATTERNS = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
_MORE_MARKERS = ("*", "H")

HEAT = "viridis"
"""Perceptually uniform and readable in grey and by the colour-blind."""

_RC = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same on every machine
    "mathtext.fontset": "dejavusans",
    "font.size": SMALL,
    "axes.titlesize": NORMAL,
    "axes.labelsize": NORMAL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "axes.titlepad": 4.0,
    "axes.labelpad": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "ytick.minor.size": 1.5,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.2,
    "hatch.linewidth": 0.4,
    "figure.dpi": 150.0,
    "savefig.dpi": 300.0,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "pdf.fonttype": 42,  # TrueType: text stays text, as conferences require
    "ps.fonttype": 42,
    "svg.fonttype": "none",
}


@contextmanager
def style() -> Iterator[None]:
    """Use the figures' rcParams inside a `with` block and leave the global ones alone."""
    with matplotlib.style.context(["default", _RC]):
        yield


class Figure(MatplotlibFigure):
    """A figure without pyplot: drawn in loopscope's style anywhere, shown once by Jupyter."""

    def draw(self, renderer: Any) -> None:
        """Draw in the style's rcParams (ticks are made only now and read them).

        Args:
            renderer: Of matplotlib.
        """
        with style():
            super().draw(renderer)

    def savefig(self, fname: Any, **options: Any) -> None:
        """Save with the style's resolution and embedded TrueType fonts.

        Args:
            fname: Path or open file, as matplotlib takes it.
            **options: Of matplotlib's `savefig`.
        """
        with style():
            super().savefig(fname, **options)

    def _repr_png_(self) -> bytes:
        """Show the figure as the last expression of a notebook cell."""
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def variant_look(variant: str, number: int = 0) -> dict[str, Any]:
    """Give a variant its line, the same in every figure.

    Args:
        variant: Its name in a configuration.
        number: Which of several lines of this variant (slots, recipes); they share its colour and
            differ in dashes and markers.

    Returns:
        Keywords of `Axes.plot`.
    """
    color, marker = _VARIANTS.get(variant, (GREY, "."))
    if number > 1:
        marker = _MORE_MARKERS[number // 2 % len(_MORE_MARKERS)]
    # sums take the colour of a term: their dashes begin one later
    number += "+" in variant
    return {
        "color": color,
        "marker": marker,
        "linestyle": _PATTERNS[number % len(_PATTERNS)],
        "markerfacecolor": "white" if number % 2 else color,
    }


def variant_rank(variant: str) -> int:
    """Give the place of a variant in a legend; unknown ones come last.

    Args:
        variant: Its name in a configuration.

    Returns:
        0 for the first.
    """
    return [*_VARIANTS, variant].index(variant)


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure with constrained layout.

    Args:
        width: Inches.
        height: Inches.

    Returns:
        The figure; call inside `style()`.
    """
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def heat_map(
    ax: Axes,
    values: Any,
    norm: Normalize,
    *,
    top: float = 0.0,
    left: float = 0.0,
    lines: float = 0.6,
) -> QuadMesh:
    """Draw a matrix as vector cells, first row on top; NaN cells stay empty.

    Args:
        ax: Where to draw.
        values: The matrix (row × column).
        norm: The colour range.
        top: Where the first row begins on the y-axis, which runs downwards.
        left: Where the first column begins on the x-axis.
        lines: Width in points of the white lines between cells; 0 for none.

    Returns:
        The mesh; its `get_array()` is the matrix.
    """
    rows, columns = values.shape
    mesh = ax.pcolormesh(
        [left + column for column in range(columns + 1)],
        [top + row for row in range(rows + 1)],
        values,
        cmap=HEAT,
        norm=norm,
        edgecolors="white" if lines else "face",
        linewidth=lines or 0.1,
        antialiased=True,
    )
    ax.set_ylim(top + rows, 0)
    ax.tick_params(length=0, pad=2)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return mesh


def cell_text(
    ax: Axes,
    values: Any,
    norm: Normalize,
    *,
    size: float = TINY,
    percent: bool = False,
    top: float = 0.0,
) -> None:
    """Print each finite value into its cell, in black or white, whichever reads better.

    Args:
        ax: Where the heat map was drawn.
        values: The matrix (row × column).
        norm: The colour range of the heat map.
        size: Font size in points.
        percent: Print whole percents (two digits need less room).
        top: Where the first row begins, as in `heat_map`.
    """
    cmap: Colormap = colormaps[HEAT]
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            value = values[row, column]
            if value == value:
                red, green, blue, _ = cmap(norm(value))
                light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
                ax.text(
                    column + 0.5,
                    top + row + 0.5,
                    f"{100 * value:.0f}" if percent else short_number(float(value)),
                    ha="center",
                    va="center",
                    fontsize=size,
                    color="black" if light else "white",
                    in_layout=False,  # inside the axes anyway; measuring it would take time
                )


def short_number(value: float) -> str:
    """Write a value near the unit range in little room: .07, 1, −.03.

    Args:
        value: The number.

    Returns:
        Two decimals without the leading zero; 0 and ±1 bare when that is what rounding gives.
    """
    text = f"{abs(value):.2f}"
    if text == "0.00":
        return "0"
    sign = "−" if value < 0 else ""
    return sign + ("1" if text == "1.00" else text.removeprefix("0"))
